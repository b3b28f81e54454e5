"""Correlations of activations and of derivatives, over locations and between maps: figures 1 and 2 of the KFC paper.

Grosse & Martens (2016, section 5.1) look at them to judge their assumptions: derivatives at different locations as
uncorrelated (SUD), which KFC makes, and activations as uncorrelated (SUA), which PRONG makes and KFC does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.forwards import batches_of, call_model
from kronfac.layers import LayerAdapter, adapt_model
from kronfac.layers.base import require_float
from kronfac.layers.conv import ConvAdapter
from kronfac.likelihoods import Likelihood
from kronfac.measuring import frozen_buffers
from kronfac.sources import Sampled
from kronfac.tape import record

#: Examples transformed at once.
CHUNK = 64
#: A variance below this share of the second moment is rounding, and correlations with it are undefined.
_NOTHING = 1e-12


class MapMoments:
    """Sums over examples from which correlations of maps follow; kept in float64.

    Args:
        maps: Number of maps.
        size: Their spatial size.
    """

    def __init__(self, maps: int, size: tuple[int, ...]) -> None:
        self.size, self.count = size, 0
        self._dims = tuple(range(-len(size), 0))
        self._padded = tuple(2 * n - 1 for n in size)  # far enough apart that lags do not wrap around
        frequencies = (*self._padded[:-1], self._padded[-1] // 2 + 1)
        self._power = torch.zeros(maps, *frequencies, dtype=torch.float64)
        self._total = torch.zeros(maps, *size, dtype=torch.float64)
        self._squares = torch.zeros(maps, *size, dtype=torch.float64)
        self._gram = torch.zeros(maps, maps, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Take in maps.

        Args:
            x: ``[N, maps, *size]``.
        """
        for part in require_float(x.detach()).cpu().double().split(CHUNK):
            spectrum = torch.fft.rfftn(part, s=self._padded, dim=self._dims)
            self._power += (spectrum.real.square() + spectrum.imag.square()).sum(0)
            self._total += part.sum(0)
            self._squares += part.square().sum(0)
            columns = part.transpose(0, 1).flatten(1)
            self._gram += columns @ columns.T
        self.count += len(x)

    def spatial(self, centred: bool = False) -> Tensor:
        """Correlate each map with itself, offset in space.

        Args:
            centred: Whether to subtract the maps' means first.

        Returns:
            Correlation at every offset ``d``, over all examples and pairs of locations ``d`` apart, ``[maps, *(2 size -
            1)]`` with the zero offset in the middle; NaN for a map that does not vary.
        """
        product = self._unwrap(self._power)
        # Moments of the first and of the second location of the pairs at each offset.
        square = self._overlap(self._squares)
        left, right = square, square.flip(self._dims)
        if centred:
            pairs = self.count * self._overlap(torch.ones(1, *self.size, dtype=torch.float64)).round()
            mean = self._overlap(self._total) / pairs
            other = mean.flip(self._dims)
            product = product - pairs * mean * other
            left, right = left - pairs * mean.square(), right - pairs * other.square()
        reference = square.amax(self._dims, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        return _ratio(product, left, right, _NOTHING * reference)

    def cross_map(self, centred: bool = False) -> Tensor:
        """Correlate maps with each other at the same location.

        Args:
            centred: Whether to subtract the maps' means first.

        Returns:
            Correlations over all examples and locations, ``[maps, maps]``; NaN for a map that does not vary.
        """
        gram = self._gram
        second = gram.diagonal()
        if centred:
            total = self._total.flatten(1).sum(1)
            gram = gram - total[:, None] * total[None, :] / (self.count * math.prod(self.size))
        variance = gram.diagonal()
        threshold = _NOTHING * second.clamp(min=torch.finfo(torch.float64).tiny)
        fine = variance > threshold
        scale = torch.where(fine, variance, torch.nan).rsqrt()
        return gram * scale[:, None] * scale[None, :]

    def _unwrap(self, spectrum: Tensor) -> Tensor:
        """Lags in order, the zero lag in the middle."""
        lags = torch.fft.irfftn(spectrum, s=self._padded, dim=self._dims)
        return torch.fft.fftshift(lags, dim=self._dims)

    def _overlap(self, x: Tensor) -> Tensor:
        """``Σ_t x_t`` over locations for which ``t + d`` lies inside, for every offset ``d``."""
        one = torch.ones(self.size, dtype=torch.float64)
        spectra = (torch.fft.rfftn(part, s=self._padded, dim=self._dims) for part in (x, one))
        left, right = spectra
        return self._unwrap(left.conj() * right)


def _ratio(product: Tensor, left: Tensor, right: Tensor, threshold: Tensor) -> Tensor:
    fine = (left > threshold) & (right > threshold)
    norm = torch.where(fine, left * right, torch.nan).sqrt()
    return (product / norm).clamp(-1.0, 1.0)


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
    """
    if radius is None:
        return correlations
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
    with frozen_buffers(model):
        for inputs, targets in batches_of(loader):
            with torch.enable_grad(), record(adapters) as tape:
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
