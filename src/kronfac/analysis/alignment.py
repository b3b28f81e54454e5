"""How well updates with approximate curvature align with exact Gauss-Newton ones (Botev et al. 2017, appendix F.2)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kronfac._typing import NamedTensors
from kronfac.analysis.gauss_newton import Solver, Update, kfac_preconditioner
from kronfac.analysis.measurement import Scene, along_training, evaluation_mode
from kronfac.analysis.method import Method, as_method
from kronfac.damping import check_damping
from kronfac.estimation import estimate
from kronfac.estimator import CoverageWarning
from kronfac.forwards import batches_of
from kronfac.layers import adapt_model
from kronfac.likelihoods import Likelihood
from kronfac.processes import alone
from kronfac.sources import DRAWN

#: Layer name of the rows over all layers together.
WHOLE = "all layers"
#: The two references, and the plain gradient among the methods.
BLOCK_DIAGONAL, FULL, GRADIENT = "block-diagonal", "full", "gradient"
_DEFAULT = ("kfac:sampled", "kfac:exact", "diagonal:exact")


class ConvergenceWarning(UserWarning):
    """Conjugate gradients did not reach the tolerance; the rows that depend on it say so."""


@dataclass(frozen=True)
class Alignment:
    """One cosine.

    Attributes:
        method: Approximation, source and damping rule; ``"gradient"``; or ``"block-diagonal"``, the exact blocks.
        layer: A layer's name, or ``"all layers"``.
        reference: ``"block-diagonal"`` or ``"full"``: which exact Gauss-Newton update it is compared with.
        cosine: Cosine of the angle between the two updates; NaN if one is zero.
        norm_ratio: Norm of the approximate update over that of the exact one.
        iterations: Iterations of conjugate gradients behind the exact update (behind all exact updates in the row).
        residual: Its relative residual (the greatest of them).
        converged: Whether that is within the tolerance. If not, the cosine is that with an unfinished solution.
        step: Steps of training done.
    """

    method: str
    layer: str
    reference: str
    cosine: float
    norm_ratio: float
    iterations: int
    residual: float
    converged: bool
    step: int = 0


def alignment(
    model: nn.Module,
    likelihood: Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    methods: Sequence[str | Method] = _DEFAULT,
    *,
    damping: float = 1e-2,
    samples: int = 1,
    full: bool = True,
    tolerance: float | None = None,
    max_iterations: int = 1000,
    precondition: bool = True,
    sharing: str = "expand",
    norm: str = "unitwise",
    seed: int = 0,
    outputs: Callable[[Any], Tensor] | None = None,
    dtype: torch.dtype | None = None,
    observe: Callable[[str], object] | None = None,
) -> list[Alignment]:
    """Cosines between approximate updates ``-(C' + damping I)^-1 g`` and exact Gauss-Newton ones.

    Everything is of the same data: the gradient ``g``, the approximate curvature ``C'`` and the exact ``C``. The model
    is in evaluation mode for the duration. The exact updates are those of Botev et al. (2017), appendix F.2: with each
    layer's own diagonal block of ``C`` (their subfigures a), and with the whole of ``C`` (b); both are found by
    conjugate gradients. Parameters without a block stay fixed throughout: ``C`` is restricted to the others, and a
    `CoverageWarning` names them.

    Args:
        model: The model; no parameter, buffer or mode is changed.
        likelihood: The loss.
        data: Pairs ``(inputs, targets)``, or one; kept in memory meanwhile.
        methods: ``"approximation:source"``, ``"approximation:source:rule"`` or `Method` objects. The rule says how the
            damping is added: ``"exact"`` by default, ``"factored"`` for what the paper marks with an asterisk.
        damping: Added to exact and approximate curvature alike; positive.
        samples: Samples per example of the sampled source.
        full: Whether to solve with the whole matrix too, the costlier part for deep networks.
        tolerance: Relative residual of conjugate gradients; by default 1e-8 in float64 and 1e-4 in float32. Cosines are
            much closer than that: their error is of second order.
        max_iterations: Iterations of one solve at most.
        precondition: Whether to precondition the solves with single blocks by KFAC. The solution is the same.
        sharing: Weight sharing over positions, ``"expand"`` or ``"reduce"``.
        norm: ``"unitwise"`` or ``"full"`` blocks of normalisation layers in approximations; a *layer* of the exact
            block-diagonal matrix is always a whole module.
        seed: Seed of sampled labels.
        outputs: Takes the output tensor out of what the model returns.
        dtype: Work on a copy of model and data in this dtype, such as ``torch.float64``; by default in the model's own.
        observe: Hears what is being worked on.

    Returns:
        A row per method, layer and reference; ``pandas.DataFrame(rows)`` makes a table of them. The methods are
        preceded by ``"gradient"`` and, against the full matrix, ``"block-diagonal"``.

    Raises:
        ValueError: If an argument is out of range, a name is unknown, or a method gives curvature for other parameters
            than KFAC does.
    """
    scene = Scene.of(model, likelihood, data, outputs, dtype)
    listed = [as_method(method) for method in methods]
    if check_damping(damping) <= 0.0:
        raise ValueError("damping must be positive: the Gauss-Newton matrix is singular in general")
    say = observe or (lambda text: None)
    adaptation = adapt_model(scene.model, sharing=sharing, norm=norm)
    if not adaptation.adapters:
        raise ValueError("no layer of the model has a curvature block; kronfac.coverage(model) says why")
    if adaptation.uncovered:
        names = ", ".join(adaptation.uncovered)
        warnings.warn(f"held fixed, since no curvature covers them: {names}", CoverageWarning, stacklevel=2)
    layers = {layer: adapter.parameter_names for layer, adapter in adaptation.adapters.items()}
    if tolerance is None:
        double = all(p.dtype == torch.float64 for p in scene.model.parameters())
        tolerance = 1e-8 if double else 1e-4
    with evaluation_mode(scene.model):
        gradient = scene.gradient(adaptation.covered)
        say("KFAC preconditioner")
        inverse = kfac_preconditioner(scene, damping, sharing, norm, seed) if precondition else None
        solver = Solver(scene, float(damping), tolerance, max_iterations, adaptation.adapters, inverse)
        say("exact block-diagonal update")
        blocks = solver.block_diagonal(gradient)
        references = {BLOCK_DIAGONAL: blocks | {WHOLE: Update.joined(blocks)}}
        updates: dict[str, NamedTensors] = {GRADIENT: {name: -g for name, g in gradient.items()}}
        if full:
            say("exact full update")
            whole = solver.full(gradient)
            references[FULL] = dict.fromkeys((*layers, WHOLE), whole)
            updates[BLOCK_DIAGONAL] = references[BLOCK_DIAGONAL][WHOLE].update
        for method in listed:
            say(method.name)
            updates[method.name] = _approximate(scene, method, gradient, damping, samples, sharing, norm, seed)
    rows = _rows(updates, references, layers)
    if failed := sorted({f"{row.reference} update of {row.layer}" for row in rows if not row.converged}):
        warnings.warn(
            f"conjugate gradients did not reach {tolerance:g} in {max_iterations} iterations for the "
            f"{'; '.join(failed)}: raise damping or max_iterations, or work in float64",
            ConvergenceWarning,
            stacklevel=2,
        )
    return rows


def alignment_during_training(
    model: nn.Module,
    likelihood: Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    advance: Callable[[], object],
    *,
    steps: int,
    every: int = 50,
    **options: Any,
) -> list[Alignment]:
    """Follow `alignment` along a training, as in Figures 5 to 7 of Botev et al. (2017).

    Args:
        model: The model in training.
        likelihood: The loss.
        data: The data to measure on, the same each time.
        advance: Does one step of training.
        steps: Number of steps.
        every: Steps between measurements; the first is before any step, the last after all.
        **options: As for `alignment`.

    Returns:
        The rows of all measurements.
    """
    batches = list(batches_of(data))

    def measure(step: int) -> list[Alignment]:
        return [replace(row, step=step) for row in alignment(model, likelihood, batches, **options)]

    return along_training(advance, steps, every, measure)


@alone()  # as are the exact products that it is compared with
def _approximate(
    scene: Scene,
    method: Method,
    gradient: NamedTensors,
    damping: float,
    samples: int,
    sharing: str,
    norm: str,
    seed: int,
) -> dict[str, Tensor]:
    """``-(C' + damping I)^-1 g`` of one method."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        curvature = estimate(
            scene.model,
            scene.likelihood,
            scene.batches,
            approximation=method.approximation,
            source=method.source,
            samples=samples if method.source in DRAWN else 1,
            sharing=sharing,
            norm=norm,
            seed=seed,
            outputs=scene.outputs,
        )
    if set(curvature.parameter_names) != set(gradient):
        other = sorted(set(curvature.parameter_names) ^ set(gradient))
        raise ValueError(f"{method.name} covers other parameters than KFAC does: {other}")
    found = curvature.factorise(damping, method.rule).apply(gradient)
    return {name: -tensor for name, tensor in found.items()}


def _rows(
    updates: Mapping[str, NamedTensors],
    references: Mapping[str, Mapping[str, Update]],
    layers: Mapping[str, Sequence[str]],
) -> list[Alignment]:
    parts = {**layers, WHOLE: tuple(name for names in layers.values() for name in names)}
    rows = []
    for method, update in updates.items():
        for reference, solutions in references.items():
            if method == BLOCK_DIAGONAL == reference:
                continue
            for layer, names in parts.items():
                behind = [solutions[layer]]
                if method == BLOCK_DIAGONAL:
                    behind.append(references[BLOCK_DIAGONAL][layer])
                cosine, ratio = _compare(update, behind[0].update, names)
                rows.append(
                    Alignment(
                        method,
                        layer,
                        reference,
                        cosine,
                        ratio,
                        sum(b.iterations for b in behind),
                        max(b.residual for b in behind),
                        all(b.converged for b in behind),
                    )
                )
    return rows


def _compare(left: NamedTensors, right: NamedTensors, names: Sequence[str]) -> tuple[float, float]:
    """Cosine and ratio of norms over some parameters, in float64."""
    one, other = (torch.cat([v[name].detach().reshape(-1).double() for name in names]) for v in (left, right))
    norms = float(torch.linalg.vector_norm(one)), float(torch.linalg.vector_norm(other))
    if 0.0 in norms:
        return math.nan, math.nan
    return float(torch.dot(one / norms[0], other / norms[1])), norms[0] / norms[1]
