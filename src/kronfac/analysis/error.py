"""How far approximations are from the exact curvature, layer by layer, and how far the steps that they give."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.analysis.exact import ExactLayers, damped_solve, flat, gather, joint_roots
from kronfac.analysis.scene import Scene, methods_of, sources_of
from kronfac.approximations import Approximation
from kronfac.blocks import Block
from kronfac.curvature import BlockDiagonal
from kronfac.damping import check_damping
from kronfac.damping.rules import exact as exactly
from kronfac.estimation import estimate
from kronfac.estimator import CoverageWarning, without_coverage_warnings
from kronfac.inspect.comparison import Roots, compare
from kronfac.likelihoods import Likelihood
from kronfac.processes import alone
from kronfac.sources import Sampled, Source

#: The ``layer`` of rows that stand for all layers together.
NETWORK = "*"

#: What an approximation or a source may raise to refuse a model, a layer or each other.
REFUSALS = (ValueError, TypeError, NotImplementedError)

Row = dict[str, Any]


def approximation_error(
    model: nn.Module,
    likelihood: Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    *,
    approximations: Sequence[str | Approximation] | str | Approximation | None = None,
    sources: Sequence[str | Source] | str | Source | None = ("exact", "sampled"),
    samples: int = 1,
    damping: float | None = None,
    relative_damping: float = 0.1,
    layers: Sequence[str] | None = None,
    sharing: str = "expand",
    norm: str = "full",
    seed: int = 0,
    outputs: Callable[[Any], Tensor] | None = None,
    updates: bool = True,
    memory_limit: int = 1 << 31,
    progress: Callable[[str], object] | None = None,
) -> list[Row]:
    """Compare approximations of the curvature with the exact Gauss-Newton matrix ``C``, on the given data, in float64.

    ``C`` of a layer is its whole diagonal block of ``(1/D) Σ_n J_nᵀ H_n J_n``, by the exact source, for all examples
    given. It is held by its roots, one for each output of each example, and formed for small layers only. The model is
    copied, its mode is kept: batch norm must be in eval mode, in which examples are independent.

    Updates are ``(C + λI)⁻¹ g`` with ``g`` the gradient of the loss on the same data. One ``λ`` is added exactly
    (``rule="exact"``) to all layers of every approximation and of the exact matrix, as an optimiser would:
    `relative_damping` times the mean eigenvalue ``Σ tr C / Σ n`` of the exact blocks, unless `damping` gives it.

    A combination that is refused (an approximation that does not fit the source, a layer or the form of the network)
    gives one row with the reason under ``refused`` and None for all figures.

    Args:
        model: The model.
        likelihood: The loss.
        data: A pair of inputs and targets, or an iterable of pairs.
        approximations: Names or objects; None for every one that is registered.
        sources: Names or objects; None for every one that estimates the Gauss-Newton matrix.
        samples: Samples of the sampled source.
        damping: ``λ`` on the scale of the curvature; by default it is relative.
        relative_damping: ``λ`` in mean eigenvalues of the exact matrix.
        layers: Names of the layers to look at; all by default.
        sharing: ``"expand"`` or ``"reduce"``.
        norm: Blocks of normalisation layers: ``"full"``, in which they are exact, or ``"unitwise"``.
        seed: Seed of sampled labels.
        outputs: Takes the output tensor out of what the model returns.
        updates: Whether to compare updates too, which costs most.
        memory_limit: Bytes that the roots may take; models and data beyond it are refused.
        progress: Called with a line before each comparison.

    Returns:
        For each approximation and source a row for each layer and one for the network, whose ``layer`` is `NETWORK`.
        Columns: ``layer``, ``approximation``, ``source``, ``samples``, ``parameters``; ``error`` ``|Ĉ - C| / |C|`` in
        the Frobenius norm, ``distance`` ``|Ĉ - C|``, ``exact_norm`` ``|C|``, ``trace_ratio`` ``tr Ĉ / tr C``,
        ``cosine`` ``⟨Ĉ, C⟩ / (|Ĉ| |C|)``, ``update_cosine`` between the two updates, ``damping`` ``λ``, ``refused``
        and ``note``. The network's row is over the diagonal blocks of all layers together (errors are added in
        quadrature); in it ``full_update_cosine`` compares with the update of the whole Gauss-Newton
        matrix, blocks between layers included.

    Raises:
        ValueError: An unknown name, batch norm in train mode, no positive damping, or too much for `memory_limit`.
    """
    methods, origins = methods_of(approximations), sources_of(sources, samples)
    check_damping(relative_damping if damping is None else damping)
    if not (relative_damping if damping is None else damping) > 0:
        raise ValueError("damping must be positive: the exact curvature of a batch is singular.")
    scene = Scene.of(model, likelihood, data, layers=layers, sharing=sharing, norm=norm, outputs=outputs)
    if scene.uncovered:
        named = ", ".join(scene.uncovered)
        warnings.warn(f"Not compared, without a block: {named}.", CoverageWarning, stacklevel=2)
    exact = gather(scene, memory_limit)
    reference = _Reference(exact, damping, relative_damping, updates)
    rows: list[Row] = []
    for source in origins:
        for method in methods:
            if progress is not None:
                progress(f"{method.name}, {source.name} source")
            count = source.count if isinstance(source, Sampled) else None
            base: Row = {"approximation": method.name, "source": source.name, "samples": count}
            rows += [base | row for row in _compared(scene, reference, method, source, seed)]
    return [{"layer": row.pop("layer"), **row} for row in rows]


@alone()  # as is the exact matrix that it is compared with
def estimate_quietly(scene: Scene, method: Approximation, source: Source, seed: int) -> BlockDiagonal:
    """Estimate the scene's curvature, without the warning that was given already.

    Args:
        scene: What is analysed.
        method: The approximation.
        source: The source.
        seed: Seed of sampled labels.

    Returns:
        The curvature.
    """
    with without_coverage_warnings():
        return estimate(
            scene.model,
            scene.likelihood,
            scene.batches,
            approximation=method,
            source=source,
            seed=seed,
            sharing=scene.options["sharing"],
            norm=scene.options["norm"],
            outputs=scene.outputs,
        )


class _Reference:
    """The exact side of all comparisons: roots, updates and their damping."""

    def __init__(self, exact: ExactLayers, damping: float | None, relative: float, updates: bool) -> None:
        self.exact, self.layers, self.updates = exact, list(exact.roots), updates
        self.roots = {name: Roots(tensor) for name, tensor in exact.roots.items()}
        self.sizes = {name: gradient.numel() for name, gradient in exact.gradients.items()}
        traces = {name: roots.trace for name, roots in self.roots.items()}
        if zero := [name for name, trace in traces.items() if not trace]:
            raise ValueError(
                f"The exact curvature of layer {zero[0]!r} is zero on these data: nothing to compare with."
            )
        mean = sum(traces.values()) / sum(self.sizes.values())
        self.damping = relative * mean if damping is None else damping
        if not updates:
            return
        self.layer_updates = {
            name: damped_solve(tensor.flatten(1), exact.gradients[name].flatten(), self.damping)
            for name, tensor in exact.roots.items()
        }
        whole = joint_roots(exact, self.layers)
        self.full_update = damped_solve(whole, flat(exact.gradients, self.layers), self.damping)


_FIGURES = ("parameters", "error", "distance", "exact_norm", "trace_ratio", "cosine", "update_cosine")


def _row(layer: str, **figures: Any) -> Row:
    empty = dict.fromkeys((*_FIGURES, "full_update_cosine", "damping", "refused"))
    return {"layer": layer, **empty, "note": "", **figures}


def _compared(scene: Scene, reference: _Reference, method: Approximation, source: Source, seed: int) -> list[Row]:
    try:
        curvature = estimate_quietly(scene, method, source, seed)
    except REFUSALS as error:
        return [_row(NETWORK, refused=str(error))]
    layers = [_layer_row(name, curvature.blocks[name], reference) for name in reference.layers]
    return [*(layer.row for layer in layers), _network_row(scene, curvature, layers, reference)]


@dataclass(frozen=True)
class _Layer:
    """A layer's row, and what the network's row is made of: update, ``⟨Ĉ, C⟩``, ``|Ĉ|`` and ``tr Ĉ``."""

    row: Row
    update: Tensor | None
    inner: float
    norm: float
    trace: float


def _layer_row(name: str, block: Block, reference: _Reference) -> _Layer:
    block = block.to(dtype=torch.float64)
    roots = reference.roots[name]
    found = compare(block, roots)
    # What the block leaves out (between groups or units, off a diagonal) is part of the layer's matrix.
    norm, left_out = math.sqrt(roots.squared(1)), found.left_out
    error = math.sqrt(found.error**2 * (1 - left_out) + left_out)
    row = _row(
        name,
        parameters=reference.sizes[name],
        error=error,
        distance=error * norm,
        exact_norm=norm,
        trace_ratio=found.scale,
        cosine=found.cosine * math.sqrt(1 - left_out),
        damping=reference.damping,
    )
    if reference.updates:
        try:
            solved = block.factorise(exactly(block, reference.damping)).apply(reference.exact.gradients[name]).flatten()
            row["update_cosine"] = cosine(solved, reference.layer_updates[name])
        except (TypeError, torch.linalg.LinAlgError) as error:
            solved, row["note"] = None, f"no update: {error}"
    else:
        solved = None
    return _Layer(row, solved, found.cosine * found.norm * found.block_norm, found.block_norm, float(block.trace()))


def _network_row(scene: Scene, curvature: BlockDiagonal, layers: list[_Layer], reference: _Reference) -> Row:
    """All layers together."""
    distance = math.hypot(*(layer.row["distance"] for layer in layers))
    norm = math.hypot(*(layer.row["exact_norm"] for layer in layers))
    found_norm = math.hypot(*(layer.norm for layer in layers))
    network = _row(
        NETWORK,
        parameters=sum(reference.sizes.values()),
        error=distance / norm,
        distance=distance,
        exact_norm=norm,
        trace_ratio=sum(layer.trace for layer in layers) / sum(roots.trace for roots in reference.roots.values()),
        cosine=sum(layer.inner for layer in layers) / (norm * found_norm) if found_norm else 0.0,
        damping=reference.damping,
    )
    if reference.updates:
        solved, network["note"] = _network_update(scene, curvature, layers, reference)
        if solved is not None:
            block_update = torch.cat([reference.layer_updates[name] for name in reference.layers])
            network["update_cosine"] = cosine(solved, block_update)
            network["full_update_cosine"] = cosine(solved, reference.full_update)
    return network


def _network_update(
    scene: Scene, curvature: BlockDiagonal, layers: list[_Layer], reference: _Reference
) -> tuple[Tensor | None, str]:
    """The damped update of all layers, and what there is to say about it."""
    if isinstance(curvature, BlockDiagonal):
        updates = [layer.update for layer in layers]
        refused = [layer.row["note"] for layer in layers if layer.row["note"]]
        return (None, refused[0]) if refused else (torch.cat([each for each in updates if each is not None]), "")
    # A matrix that couples layers: its diagonal blocks do not make its update.
    parts: dict[str, Tensor] = {}
    for name, adapter in scene.adapters.items():
        parts |= {key: part.contiguous() for key, part in adapter.unpack(reference.exact.gradients[name]).items()}
    note = ""
    for rule in ("exact", "factored"):
        try:
            solved = curvature.factorise(reference.damping, rule).apply(parts)
        except (TypeError, torch.linalg.LinAlgError) as error:
            note = f"no update: {error}"
            continue
        packed = {name: adapter.pack(solved).double() for name, adapter in scene.adapters.items()}
        note = note and "update of all layers together with factored damping, since exact damping is refused"
        return flat(packed, reference.layers), note
    return None, note


def cosine(left: Tensor, right: Tensor) -> float:
    """Cosine of the angle between two vectors.

    Args:
        left: One vector.
        right: The other.

    Returns:
        The cosine; 1 if both are zero, 0 if one is.
    """
    norms = float(left.norm()) * float(right.norm())
    return float(left @ right) / norms if norms else float(not left.any() and not right.any())
