"""The exact block of a layer, what approximations make of it, and the difference, as dense matrices to look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.analysis.error import REFUSALS, Row, estimate_quietly
from kronfac.analysis.exact import gather
from kronfac.analysis.scene import Scene, methods_of, sources_of
from kronfac.approximations import Approximation
from kronfac.inspect.text import size
from kronfac.layers import LayerAdapter
from kronfac.likelihoods import Likelihood
from kronfac.sources import Source

#: Orders of the entries of the matrix ``V`` of a layer.
ORDERS = ("rows", "columns")


def matrices(
    model: nn.Module,
    likelihood: Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    layer: str,
    *,
    approximations: Sequence[str | Approximation] | str | Approximation | None = None,
    source: str | Source = "exact",
    samples: int = 1,
    weights_only: bool = False,
    order: str = "rows",
    sharing: str = "expand",
    norm: str = "full",
    seed: int = 0,
    outputs: Callable[[Any], Tensor] | None = None,
    memory_limit: int = 1 << 31,
) -> list[Row]:
    """Form one layer's block of the Gauss-Newton matrix, exact and approximated (Gao et al. 2020, Figure 1).

    Args:
        model: The model; batch norm in eval mode.
        likelihood: The loss.
        data: A pair of inputs and targets, or an iterable of pairs.
        layer: Name of the layer.
        approximations: Names or objects; None for every one that is registered.
        source: Name or object; of the approximations, for the exact block is exact.
        samples: Samples of the sampled source.
        weights_only: Leave the bias out, as the papers' figures do.
        order: ``"rows"``: entries of ``V`` ``[d_out, d_in]`` row by row, so that a Kronecker block is ``G ⊗ A``;
            ``"columns"``: column by column, ``A ⊗ G``, as in the papers.
        sharing: ``"expand"`` or ``"reduce"``.
        norm: ``"full"`` or ``"unitwise"`` blocks of normalisation layers.
        seed: Seed of sampled labels.
        outputs: Takes the output tensor out of what the model returns.
        memory_limit: Bytes that the matrices may take.

    Returns:
        A row for the exact block (``approximation`` is ``"exact"``) and one for each approximation, with the columns
        ``layer``, ``approximation``, ``source``, ``matrix`` ``[n, n]`` in float64, ``difference`` ``|Ĉ - C|`` entry by
        entry, ``error`` ``|Ĉ - C| / |C|`` of the matrices shown (0 where both are zero), and ``refused`` with the
        reason of a refusal.

    Raises:
        ValueError: An unknown name or order, or matrices that are too large.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is unknown; choose one of {ORDERS}.")
    methods, (origin,) = methods_of(approximations), sources_of([source], samples)
    scene = Scene.of(model, likelihood, data, layers=[layer], sharing=sharing, norm=norm, outputs=outputs)
    (adapter,) = scene.adapters.values()
    entries = adapter.shape.numel()
    if (needed := 16 * entries**2 * (1 + len(methods))) > memory_limit:
        raise ValueError(
            f"Matrices of layer {layer!r}, {entries} x {entries} each, need {size(needed)} with {len(methods)} "
            f"approximations; memory_limit is {size(memory_limit)}. Choose a smaller layer or fewer approximations, or "
            "use kronfac.analysis.approximation_error, which forms no matrix."
        )
    chosen = _chosen(adapter, weights_only, order)
    roots = gather(scene, memory_limit).roots[layer].flatten(1)[:, chosen]
    exact = roots.mT @ roots
    empty: Row = {"layer": layer, "source": origin.name, "matrix": None, "difference": None, "error": None}
    rows: list[Row] = [empty | {"approximation": "exact", "source": "exact", "matrix": exact, "refused": None}]
    for method in methods:
        row = empty | {"approximation": method.name, "refused": None}
        try:
            block = estimate_quietly(scene, method, origin, seed).blocks[layer]
        except REFUSALS as error:
            rows.append(row | {"refused": str(error)})
            continue
        matrix = block.to_dense().double()[chosen][:, chosen]
        difference = (matrix - exact).abs()
        rows.append(row | {"matrix": matrix, "difference": difference, "error": _ratio(difference, exact)})
    return rows


def _chosen(adapter: LayerAdapter, weights_only: bool, order: str) -> Tensor:
    """Places of the entries to show within the row-major ``vec(V)``."""
    places = torch.arange(adapter.shape.numel()).view(adapter.shape)
    if weights_only:
        if not adapter.has_weight:
            raise ValueError(f"Layer {adapter.name!r} has no trained weight to show.")
        places = places[..., : adapter.d_in - int(adapter.has_bias)]
    return (places.mT if order == "columns" else places).flatten()


def _ratio(difference: Tensor, exact: Tensor) -> float:
    distance, norm = float(difference.norm()), float(exact.norm())
    return distance / norm if norm else (math.inf if distance else 0.0)
