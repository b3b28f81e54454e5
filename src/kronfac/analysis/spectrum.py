"""Eigenvalues of each layer's block: the exact one's, and what approximations make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.analysis.scene import require_one_network
from kronfac.approximations import Approximation, DenseBlocks, get_approximation
from kronfac.approximations.joint import require_per_layer
from kronfac.blocks import Block, Dense
from kronfac.estimation import estimate
from kronfac.estimator import without_coverage_warnings
from kronfac.forwards import batches_of
from kronfac.layers import LayerAdapter, adapt_model
from kronfac.likelihoods import Likelihood
from kronfac.sources import Source

#: Largest layer, in parameters, whose exact block is taken apart: a minute or so on one core.
LIMIT = 5000
#: What the exact block is called in the table.
EXACT = "exact"


@dataclass(frozen=True)
class Eigenvalue:
    """A row of the table.

    Attributes:
        layer: The layer.
        approximation: ``"exact"``, or the approximation's name.
        index: 0 for the largest eigenvalue of the layer's block, and so on.
        eigenvalue: Not negative; in units of the loss's curvature.
    """

    layer: str
    approximation: str
    index: int
    eigenvalue: float


def spectrum(
    model: nn.Module,
    likelihood: Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    *,
    approximations: Sequence[str | Approximation] = ("kfac",),
    source: str | Source = "exact",
    samples: int = 1,
    layers: Sequence[str] | None = None,
    sharing: str = "expand",
    norm: str = "unitwise",
    seed: int = 0,
    outputs: Callable[[Any], Tensor] | None = None,
    limit: int = LIMIT,
) -> list[Eigenvalue]:
    """Compute all eigenvalues of the layers' exact blocks and of their approximations.

    The exact block is that of ``approximation="dense"`` from the same source and, where that draws labels, the same
    ones.
    Layers that are not asked for are frozen meanwhile, which changes no other layer's block.

    Args:
        model: The model, in the mode that is meant; in float64 for small eigenvalues to mean something.
        likelihood: The loss.
        data: Pairs ``(inputs, targets)`` or a single pair, as for `kronfac.estimate`; read once per approximation.
        approximations: What to compare with the exact block, by name or as objects.
        source: Name or object.
        samples: Samples of the sampled source.
        layers: Names of the layers to look at; all by default.
        sharing: ``"expand"`` or ``"reduce"``.
        norm: ``"unitwise"`` or ``"full"`` blocks of normalisation layers.
        seed: Seed of the sampled labels.
        outputs: Picks the output tensor where the model returns something else.
        limit: Largest number of parameters of a layer whose exact block is taken apart.

    Returns:
        A row per eigenvalue, which ``pandas.DataFrame(rows)`` turns into a table: layers in the model's order, the
        exact block first, largest eigenvalues first.

    Raises:
        ValueError: A layer is unknown or too large, approximations repeat or couple layers, data can be read only
            once, or the model draws random numbers.
    """
    methods = _methods(approximations)
    if isinstance(data, Iterator):
        raise ValueError(f"data is a {type(data).__name__}, which can be read only once; pass a list of pairs.")
    if layers is not None and (isinstance(layers, str) or not layers):
        raise ValueError(f"layers={layers!r} must be a list of names, of one layer at least.")
    adapters = adapt_model(model, sharing=sharing, norm=norm).adapters
    chosen = list(adapters) if layers is None else [name for name in adapters if name in set(layers)]
    if unknown := sorted(set(layers or ()) - set(adapters)):
        raise ValueError(f"layers {unknown} have no curvature block; those that do are {list(adapters)}.")
    _check_sizes({name: adapters[name] for name in chosen}, limit)
    for inputs, _ in islice(batches_of(data), 1):
        require_one_network(model, inputs, outputs)
    found: dict[str, dict[str, Tensor]] = {name: {} for name in chosen}
    with _only(adapters, chosen), without_coverage_warnings():
        for label, method in methods.items():
            curvature = estimate(
                model,
                likelihood,
                data,
                approximation=method,
                source=source,
                samples=samples,
                sharing=sharing,
                norm=norm,
                seed=seed,
                outputs=outputs,
            )
            for name in chosen:
                found[name][label] = eigenvalues(curvature.blocks[name])
    return [
        Eigenvalue(name, label, index, value)
        for name, by_method in found.items()
        for label, values in by_method.items()
        for index, value in enumerate(values.tolist())
    ]


def eigenvalues(block: Block) -> Tensor:
    """All eigenvalues of a block, in float64.

    Args:
        block: The block.

    Returns:
        Shape ``[P]``, descending; rounding below zero is set to zero.
    """
    block = block.to(dtype=torch.float64)
    # A dense block's eigenvectors would cost several times what its eigenvalues do.
    values = torch.linalg.eigvalsh(block.matrix) if isinstance(block, Dense) else block.eigh().values
    return values.clamp_min(0).flatten().sort(descending=True).values


def _methods(approximations: Sequence[str | Approximation]) -> dict[str, Approximation]:
    """The exact block, and the approximations by name."""
    if isinstance(approximations, str | Approximation):
        raise TypeError(f"approximations must be a list of names or objects, not {approximations!r} alone.")
    methods: dict[str, Approximation] = {EXACT: DenseBlocks()}
    for given in approximations:
        method = get_approximation(given)
        require_per_layer(method, "spectrum")
        if isinstance(method, DenseBlocks):
            raise ValueError("approximations hold 'dense', the exact block, which is part of every spectrum anyway.")
        if method.name in methods:
            raise ValueError(f"approximations hold {method.name!r} twice.")
        methods[method.name] = method
    return methods


def _check_sizes(layers: Mapping[str, LayerAdapter], limit: int) -> None:
    large = {name: layer.d_out * layer.d_in for name, layer in layers.items() if layer.d_out * layer.d_in > limit}
    if not large:
        return
    named = ", ".join(f"{name!r} ({size}x{size}, {8 * size * size / 2**30:.2g} GiB)" for name, size in large.items())
    rest = [name for name in layers if name not in large]
    advice = f"look at layers={rest} alone" if rest else "use a smaller network"
    raise ValueError(
        f"The exact blocks of layers {named} are too large to be taken apart, with a limit of {limit} parameters per "
        f"layer: {advice}, or raise limit= if time and memory allow. kronfac.analysis.eigenvalues gives the spectrum "
        "of a factored block of any size."
    )


@contextmanager
def _only(adapters: Mapping[str, LayerAdapter], chosen: Sequence[str]) -> Iterator[None]:
    """Freeze the other layers within the block."""
    others = [
        parameter for name, layer in adapters.items() if name not in chosen for parameter in layer.parameters.values()
    ]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
