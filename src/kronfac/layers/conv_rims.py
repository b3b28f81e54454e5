"""The axes of a convolution over images, what their taps miss at the rims, and tables of both as indices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kronfac.layers.geometry import Geometry


@dataclass(frozen=True)
class Axis:
    """One spatial dimension of a convolution of unit stride.

    Attributes:
        size: Size of the map.
        out: Number of outputs.
        taps: Number of taps.
        dilation: Their distance.
        pad: Zeros before the map.
    """

    size: int
    out: int
    taps: int
    dilation: int
    pad: int

    @property
    def reach(self) -> int:
        """Largest lag."""
        return (self.taps - 1) * self.dilation

    def missed(self, tap: int, other: int) -> list[int]:
        """Positions of the map that ``tap`` does not read although they and their partner at the lag exist."""
        lag, first = (other - tap) * self.dilation, tap * self.dilation - self.pad
        return [p for p in range(max(0, -lag), min(self.size, self.size - lag)) if not first <= p < first + self.out]


@dataclass(frozen=True)
class Rims:
    """What the taps of one axis miss.

    Attributes:
        strips: Pairs of a position and a lag, in units of the dilation.
        missed: For each pair of taps the indices of its strips.
    """

    strips: tuple[tuple[int, int], ...]
    missed: dict[tuple[int, int], tuple[int, ...]]


@lru_cache(maxsize=512)
def rims(axis: Axis) -> Rims:
    """Tabulate what the taps of an axis miss."""
    index: dict[tuple[int, int], int] = {}
    missed = {}
    for tap in range(axis.taps):
        for other in range(axis.taps):
            found = [(p, other - tap) for p in axis.missed(tap, other)]
            missed[tap, other] = tuple(index.setdefault(strip, len(index)) for strip in found)
    return Rims(tuple(index), missed)


def axes(geometry: Geometry, size: tuple[int, ...]) -> tuple[Axis, Axis] | None:
    """The two axes of a convolution over images of unit stride, or None of any other."""
    if len(size) != 2 or geometry.groups > 1 or geometry.stride != (1, 1) or geometry.mode != "constant":
        return None
    out = geometry.output_size(size)
    parts = zip(size, out, geometry.kernel, geometry.dilation, geometry.padding, strict=True)
    rows, columns = (Axis(n, t, k, d, pad[0]) for n, t, k, d, pad in parts)
    return rows, columns


def places(axis: Axis) -> list[int]:
    """Positions of strips and of their partners."""
    return sorted({p + shift * axis.dilation for p, lag in rims(axis).strips for shift in (0, lag)})


@lru_cache(maxsize=64)
def lag_index(taps: int, device: torch.device) -> Tensor:
    """Lags of all pairs of taps, from 0 on: ``[taps²]``."""
    tap = torch.arange(taps, device=device)
    return (tap[None, :] - tap[:, None] + taps - 1).flatten()


@lru_cache(maxsize=512)
def missed_index(axis: Axis, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pairs of taps that miss something and the strips they miss, as indices."""
    found = [(i * axis.taps + j, strip) for (i, j), strips in rims(axis).missed.items() for strip in strips]
    return _indices(found, device)


@lru_cache(maxsize=512)
def missed_lines(axis: Axis, lag: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Taps that miss something of their pair at a lag, and what they miss among the strips of :func:`downward`."""
    strips = downward(axis)
    found = [(i, strips.index(s)) for i in range(axis.taps - lag) for s in rims(axis).missed[i, i + lag]]
    return _indices(found, device)


@lru_cache(maxsize=512)
def strip_index(axis: Axis, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of all strips and, from 0 on, their lags."""
    return _indices([(place, lag + axis.taps - 1) for place, lag in rims(axis).strips], device)


def _indices(pairs: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    first, second = torch.tensor(pairs, device=device, dtype=torch.int64).view(-1, 2).unbind(1)
    return first, second


def downward(axis: Axis) -> list[int]:
    """Numbers of the strips whose partners are not above them."""
    return [index for index, (_, lag) in enumerate(rims(axis).strips) if lag >= 0]
