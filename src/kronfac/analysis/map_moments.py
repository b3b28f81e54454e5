"""Sums over examples of maps, from which their correlations over space and with each other follow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kronfac.layers.base import require_float

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
