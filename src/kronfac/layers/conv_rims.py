"""The axes of a convolution over images, what their taps miss at the rims, and tables of both."""

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


def downward(axis: Axis) -> list[int]:
    """Numbers of the strips whose partners are not above them."""
    return [index for index, (_, lag) in enumerate(rims(axis).strips) if lag >= 0]


@lru_cache(maxsize=512)
def across_table(axis: Axis, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of which pieces the block of a pair of taps is the sum: the one of its lag, less the strips that it misses.

    Args:
        axis: The second axis.
        dtype: Of the table.
        device: Where.

    Returns:
        Shape ``[taps², lags + strips]``, lags from the least on.
    """
    lags = 2 * axis.taps - 1
    table = torch.zeros(axis.taps**2, lags + len(rims(axis).strips), dtype=dtype)
    for (tap, other), missed in rims(axis).missed.items():
        row = table[tap * axis.taps + other]
        row[other - tap + axis.taps - 1] = 1.0
        row[[lags + strip for strip in missed]] = -1.0
    return table.to(device)


@lru_cache(maxsize=512)
def downward_table(axis: Axis, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same for the first axis, where only lags from zero on are needed.

    Args:
        axis: The first axis.
        dtype: Of the table.
        device: Where.

    Returns:
        Shape ``[taps (taps + 1) / 2, taps + strips]``, pairs ordered by their lag; strips are :func:`downward`'s.
    """
    strips = downward(axis)
    pairs = [(tap, tap + lag) for lag in range(axis.taps) for tap in range(axis.taps - lag)]
    table = torch.zeros(len(pairs), axis.taps + len(strips), dtype=dtype)
    for row, (tap, other) in zip(table, pairs, strict=True):
        row[other - tap] = 1.0
        row[[axis.taps + strips.index(strip) for strip in rims(axis).missed[tap, other]]] = -1.0
    return table.to(device)
