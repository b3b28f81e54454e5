"""Correlations of activations and of derivatives, over locations and between maps: figures 1 and 2 of the KFC paper.

Grosse & Martens (2016, section 5.1) look at them to judge their assumptions: derivatives at different locations as
uncorrelated (SUD), which KFC makes, and activations as uncorrelated (SUA), which PRONG makes and KFC does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.analysis.map_moments import MapMoments
from kronfac.forwards import batches_of, call_model
from kronfac.layers import LayerAdapter, adapt_model
from kronfac.layers.conv import ConvAdapter
from kronfac.likelihoods import Likelihood
from kronfac.measuring import frozen_buffers
from kronfac.operators.passes import RandomStream
from kronfac.sources import Sampled
from kronfac.tape import record


def spatial_autocorrelation(maps: Tensor, *, centred: bool = False, radius: int | None = None) -> Tensor:
    """Correlate each map with itself, offset in space (figures 1a and 2a of Grosse & Martens 2016).

    ``ρ(d) = Σ a_t a_{t+d} / √(Σ a_t² Σ a_{t+d}²)``, with sums over examples and all locations such that both lie in the
    map: between -1 and 1, and 1 at the zero offset, whether or not the maps are spatially homogeneous.

    Args:
        maps: ``[N, C, *size]``.
        centred: Subtract each map's mean first; the paper does not (derivatives have mean zero anyway).
        radius: Largest offset; all by default.

    Returns:
        Correlations ``[C, *(2 radius + 1)]``, float64, the zero offset in the middle; NaN for a map that is zero.
    """
    moments = MapMoments(maps.shape[1], tuple(maps.shape[2:]))
    moments.add(maps)
    return cropped(moments.spatial(centred), radius)


def cross_map_correlation(maps: Tensor, *, centred: bool = False) -> Tensor:
    """Correlate different maps at the same location (figures 1b and 2b of Grosse & Martens 2016).

    Args:
        maps: ``[N, C, *size]``.
        centred: Subtract each map's mean first; the paper does not.

    Returns:
        Correlations over examples and locations ``[C, C]``, float64; NaN for a map that is zero.
    """
    moments = MapMoments(maps.shape[1], tuple(maps.shape[2:]))
    moments.add(maps)
    return moments.cross_map(centred)


def cropped(correlations: Tensor, radius: int | None) -> Tensor:
    """Cut offsets beyond a radius away.

    Args:
        correlations: ``[C, *(2 size - 1)]``.
        radius: Largest offset to keep, or None for all.

    Returns:
        A view.

    Raises:
        ValueError: The radius is negative.
    """
    if radius is None:
        return correlations
    if radius < 0:
        raise ValueError(f"radius={radius!r} must be at least 0, or None for all offsets.")
    for dim in range(1, correlations.ndim):
        middle = correlations.shape[dim] // 2
        kept = min(radius, middle)
        correlations = correlations.narrow(dim, middle - kept, 2 * kept + 1)
    return correlations


@dataclass(frozen=True)
class LayerCorrelations:
    """Correlations at one convolution.

    Attributes:
        layer: The layer's name.
        kind: ``"activations"``, which it reads and of which its ``Ω`` is made, or ``"derivatives"``, of the loss of
            labels drawn from the model, in what it gives.
        spatial: Autocorrelation of each map, ``[maps, *(2 radius + 1)]``.
        cross_map: Correlations between maps at one location, ``[maps, maps]``.
    """

    layer: str
    kind: str
    spatial: Tensor
    cross_map: Tensor

    def alive(self) -> Tensor:
        """Indices of the maps that are not zero throughout (dead units), which correlate with nothing.

        Returns:
            Indices.
        """
        return (~self.cross_map.diagonal().isnan()).nonzero().flatten()

    def by_distance(self) -> Tensor:
        """Mean absolute autocorrelation over maps and offsets, by the larger of the offset's components.

        Returns:
            ``[radius + 1]``, from distance 0.
        """
        middle = [n // 2 for n in self.spatial.shape[1:]]
        axes = [torch.arange(n) - m for n, m in zip(self.spatial.shape[1:], middle, strict=True)]
        distance = torch.stack(torch.meshgrid(*axes, indexing="ij")).abs().amax(0)
        size = self.spatial.abs()
        return torch.stack([size[:, distance == d].nanmean() for d in range(max(middle) + 1)])

    def between_maps(self) -> Tensor:
        """Absolute correlations between different maps, each pair once, those of maps that are zero left out.

        Returns:
            A vector.
        """
        row, column = torch.triu_indices(len(self.cross_map), len(self.cross_map), offset=1)
        values = self.cross_map[row, column].abs()
        return values[~values.isnan()]


def convolution_correlations(
    model: nn.Module,
    likelihood: Likelihood,
    loader: Iterable[Any] | tuple[Any, Any],
    *,
    centred: bool = False,
    radius: int | None = None,
    seed: int = 0,
) -> list[LayerCorrelations]:
    """Measure the correlations of figures 1 and 2 at every convolution of a model.

    Args:
        model: The model, in the mode in which it is to be looked at.
        likelihood: The loss; labels are drawn from the model's prediction.
        loader: Pairs of inputs and targets, or one pair.
        centred: Subtract each map's mean first.
        radius: Largest offset; all by default.
        seed: Of the labels.

    Returns:
        For every convolution, in the order of the forward pass, its derivatives and its activations.

    Raises:
        ValueError: There is no convolution with trained parameters, or no data, or images differ in size.
    """
    found = adapt_model(model).adapters
    adapters: dict[str, LayerAdapter] = {n: a for n, a in found.items() if isinstance(a, ConvAdapter)}
    if not adapters:
        raise ValueError("the model has no convolution with trained parameters, of which maps could be correlated")
    source = Sampled()
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    moments: dict[tuple[str, str], MapMoments] = {}
    draws = RandomStream(model, seed)
    with frozen_buffers(model):
        for inputs, targets in batches_of(loader):
            with draws(), torch.enable_grad(), record(adapters) as tape:
                outputs = call_model(model, inputs)
            for sample in next(source.samples(tape, likelihood, outputs, targets, generator)):
                assert sample.cotangents is not None
                for kind, maps in (("derivatives", sample.cotangents), ("activations", sample.inputs)):
                    key = (sample.layer.name, kind)
                    if key not in moments:
                        moments[key] = MapMoments(maps.shape[1], tuple(maps.shape[2:]))
                    if tuple(maps.shape[2:]) != moments[key].size:
                        raise ValueError(
                            f"The {kind} of layer {sample.layer.name!r} are maps of size {tuple(maps.shape[2:])} after "
                            f"maps of size {moments[key].size}: correlations at an offset need images of one size."
                        )
                    moments[key].add(maps)
    if not moments:
        raise ValueError("loader is empty: no batch to correlate maps over.")
    return [
        LayerCorrelations(layer, kind, cropped(sums.spatial(centred), radius), sums.cross_map(centred))
        for (layer, kind), sums in moments.items()
    ]


def autocorrelation(
    model: nn.Module,
    likelihood: Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    *,
    centred: bool = False,
    radius: int | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Tabulate how the maps of convolutions correlate over space; `convolution_correlations` has them whole.

    Args:
        model: The model, in the mode in which it is to be looked at.
        likelihood: The loss; labels are drawn from the model's prediction.
        data: Pairs of inputs and targets, or one pair.
        centred: Subtract each map's mean first.
        radius: Largest distance; all by default.
        seed: Of the labels.

    Returns:
        For every convolution, derivatives and activations apart, a row for each distance from 0 on. Columns:
        ``layer``; ``kind``, ``"derivatives"`` or ``"activations"``; ``maps``, their number, and ``alive``, that of
        those that are not zero throughout; ``distance``, the larger component of an offset; ``autocorrelation``, the
        mean absolute correlation of the living maps with themselves at that distance, NaN where there are none.
    """
    found = convolution_correlations(model, likelihood, data, centred=centred, radius=radius, seed=seed)
    rows: list[dict[str, Any]] = []
    for entry in found:
        same = {"layer": entry.layer, "kind": entry.kind, "maps": len(entry.spatial), "alive": len(entry.alive())}
        means = entry.by_distance().tolist()
        rows += [same | {"distance": distance, "autocorrelation": mean} for distance, mean in enumerate(means)]
    return rows
