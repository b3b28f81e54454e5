"""Second moment of a convolution's rows from autocorrelations: one library call for all lags, strips for the rims.

With unit stride the block of taps ``t, t'`` is ``Σ x_p x_{p+δ}ᵀ`` over the positions ``p`` that tap ``t`` reads, with
the lag ``δ = t' - t``.  If every tap read the whole map it would depend on the lag alone: ``k(2k-1)`` products instead
of ``k⁴/2``.  These autocorrelations are what a library's weight gradient computes for a kernel of ``k × (2k-1)`` taps
with the map as input *and* as gradient, and it does so without unfolding anything.  What taps miss lies in a few rows
and columns at the rim; their products are subtracted.

Exact: sums are cut into parts of :data:`POSITIONS`, since the weight gradient adds one position after the other (4e-7
in float32 then, relative to the largest entry; 1e-5 in one piece of 131 072 positions).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from kronfac.layers.conv_rims import (
    Axis,
    axes,
    downward,
    lag_index,
    missed_index,
    missed_lines,
    places,
    rims,
    strip_index,
)
from kronfac.layers.geometry import Geometry

#: Positions summed by one call of the weight gradient.
POSITIONS = 1 << 15
#: Channels from which on the weight gradient is efficient; below it vector registers stay empty.
LEAST_CHANNELS = 16
#: Channels up to which products of segments are the cheapest form where there is no exact weight gradient.
MOST_IN_SEGMENTS = 32
#: Channels up to which the strips at the rims stay cheap.
MOST_CHANNELS = 256
#: Entries of a padded map that are copied at once where the lags are matrix products.
ENTRIES = 1 << 20


@lru_cache(maxsize=512)
def _lags_pay(geometry: Geometry, size: tuple[int, ...]) -> bool:
    found = axes(geometry, size)
    if found is None or geometry.kernel == (1, 1):
        return False
    rows, columns = found
    taps, positions = rows.taps * columns.taps, math.prod(geometry.output_size(size))
    whole = rows.taps * (2 * columns.taps - 1) * rows.size * columns.size
    downward = sum(lag >= 0 for _, lag in rims(rows).strips)
    thin = downward * (2 * columns.reach + 1) * columns.size + len(rims(columns).strips) * rows.taps * rows.size
    # Thin products run at a third of the rate; im2col makes about 0.7 of all products when it is wide. Measured for 20
    # shapes from 1 to 512 channels.
    return 3.7 * thin < whole and whole + 3 * thin < 0.7 * taps**2 * positions


def lags_pay(x: Tensor, geometry: Geometry) -> bool:
    """Whether this form is the cheapest one for an input.

    Args:
        x: Input ``[N, C, *size]``.
        geometry: The convolution.

    Returns:
        True if so.
    """
    if x.device.type != "cpu" or not _lags_pay(geometry, tuple(x.shape[2:])):
        return False
    return x.shape[1] <= (MOST_CHANNELS if gradient_is_exact(x) else MOST_IN_SEGMENTS)


def add_by_lags_(total: Tensor, x: Tensor, geometry: Geometry, alpha: float = 1.0) -> None:
    """Add ``alpha Σ_r a_r a_rᵀ`` over all rows (without ones) to ``total``, both triangles.

    A bounded number of examples is copied at a time.

    Args:
        total: Running sum ``[d, d]``; it may be a strided view.
        x: Input ``[N, C, H, W]``.
        geometry: The convolution; :func:`axes` applies to it.
        alpha: Factor of what is added.
    """
    found = axes(geometry, tuple(x.shape[2:]))
    assert found is not None
    rows, columns = found
    channels, taps = x.shape[1], columns.taps
    whole, upright, lines = _read(x, rows, columns)
    base = _subtract(_toeplitz(whole, taps), columns, _column_strips(upright, rows, columns))
    strips = _row_strips(lines, rows, columns)
    blocks = total.unflatten(-1, (channels, rows.taps, taps)).unflatten(0, (channels, rows.taps, taps))
    for lag in range(rows.taps):
        # Blocks of the pairs of kernel lines (i, i + lag), for all i.
        part = base[lag].expand(rows.taps - lag, *base.shape[1:])
        lines_i, missed = missed_lines(rows, lag, x.device)
        if len(missed):
            part = part.index_add(0, lines_i, strips.index_select(0, missed), alpha=-1)
        part = part.unflatten(1, (taps, taps)).permute(3, 1, 4, 2, 0)
        blocks.diagonal(lag, 1, 4).add_(part, alpha=alpha)
        if lag:
            blocks.diagonal(-lag, 1, 4).add_(part.permute(2, 3, 0, 1, 4), alpha=alpha)


def gradient_is_exact(x: Tensor) -> bool:
    """Whether a weight gradient of this input is computed in full float32 by an optimised library."""
    # Without AVX-512 its sums lose five times as much (2e-6), and it is no faster than products of segments.
    if x.device.type != "cpu" or x.dtype != torch.float32 or not torch.backends.mkldnn.enabled:
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    precision = torch.backends.mkldnn.conv.fp32_precision  # type: ignore[attr-defined]
    return torch.backends.mkldnn.is_available() and precision in ("none", "ieee")


def _read(x: Tensor, rows: Axis, columns: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """Read the map once, part by part.

    Returns:
        Autocorrelations ``Σ_p x_p x_{p+δ}ᵀ`` over the whole map at all lags ``0 ≤ δ_1``, ``[k_1, 2 k_2 - 1, C, C]``
        by lag downwards, lag to the right from its least on, channel of ``p``, of ``p + δ``; the columns
        ``[places, N, H, C]`` and the rows ``[places, N, W, C]`` at the rims, with zeros after and around them.
    """
    batch, channels, height, width = x.shape
    by_gradient = channels >= LEAST_CHANNELS and gradient_is_exact(x)
    at_once = POSITIONS // (height * width) if by_gradient else ENTRIES // (height * width * channels)
    form = _by_weight_gradient if by_gradient else _by_segments
    down, right = places(rows), places(columns)
    upright = x.new_zeros(len(right), batch, height + rows.reach, channels)
    lines = x.new_zeros(len(down), batch, width + 2 * columns.reach, channels)
    found, start = [], 0
    for part in x.split(max(1, at_once)):
        image = part.permute(0, 2, 3, 1).contiguous()
        here = slice(start, start := start + len(image))
        for index, place in enumerate(right):
            upright[index, here, :height] = image[:, :, place]
        for index, place in enumerate(down):
            lines[index, here, columns.reach : columns.reach + width] = image[:, place]
        found.append(form(image, rows, columns))
    return found[0] if len(found) == 1 else torch.stack(found).sum(0), upright, lines


def _by_weight_gradient(image: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Autocorrelations of a contiguous ``[N, H, W, C]``; the library adds fewest terms in a row with channels last."""
    channels = image.shape[3]
    weight = image.new_empty(channels, rows.taps, 2 * columns.taps - 1, channels)
    found = torch.ops.aten.convolution_backward(
        image.permute(0, 3, 1, 2),
        F.pad(image, (0, 0, 0, 0, 0, rows.reach)).permute(0, 3, 1, 2),
        weight.permute(0, 3, 1, 2),
        None,
        [1, 1],
        [0, columns.reach],
        [rows.dilation, columns.dilation],
        False,
        [0, 0],
        1,
        [False, True, False],
    )[1]
    return found.permute(2, 3, 0, 1).contiguous()


def _by_segments(image: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """The same by products of segments of a row with the segments around them; lags lie on their diagonals."""
    batch, height, width, channels = image.shape
    length = max(1, min(width, -(-24 // channels)))
    segments, reach = -(-width // length), columns.reach
    # Rows of zeros part the examples, so that the lines of one meet no other's.
    padded = image.new_zeros(batch, height + rows.reach, segments * length + 2 * reach, channels)
    padded[:, :height, reach : reach + width] = image
    lines, line, step = batch * padded.shape[1], padded.shape[2] * channels, length * channels
    around = (length + 2 * reach) * channels
    found = []
    for tap in range(rows.taps):
        lag = tap * rows.dilation
        left = padded.as_strided((segments, step, lines - lag), (step, 1, line), reach * channels)
        right = padded.as_strided((segments, lines - lag, around), (step, line, 1), lag * line)
        product = torch.bmm(left, right).sum(0)
        diagonals = product.as_strided(
            (length, 2 * columns.taps - 1, channels, channels),
            (channels * (around + 1), columns.dilation * channels, around, 1),
        )
        found.append(diagonals.sum(0))
    return torch.stack(found)


def _toeplitz(lags: Tensor, taps: int) -> Tensor:
    """Blocks of all pairs of taps, ``[B, taps², C, C]``, from those of their lags ``[B, 2 taps - 1, C, C]``."""
    return lags.index_select(1, lag_index(taps, lags.device))


def _subtract(blocks: Tensor, axis: Axis, strips: Tensor) -> Tensor:
    """Take from blocks ``[B, taps², C, C]`` what their taps miss of strips ``[B, strips, C, C]``, in place."""
    pairs, missed = missed_index(axis, blocks.device)
    return blocks.index_add_(1, pairs, strips.index_select(1, missed), alpha=-1)


def _column_strips(upright: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Products of the columns at the rim with their partners at all lags downwards: ``[k_1, strips, C, C]``."""
    strips, held = rims(columns).strips, places(columns)
    channels = upright.shape[3]
    if not strips:
        return upright.new_zeros(rows.taps, 0, channels, channels)
    whole = upright.flatten(1, 2)
    left = whole[[held.index(p) for p, _ in strips]]
    right = whole[[held.index(p + lag * columns.dilation) for p, lag in strips]]
    lines, lags = whole.shape[1], range(0, rows.reach + 1, rows.dilation)
    return torch.stack([torch.bmm(left[:, : lines - lag].mT, right[:, lag:]) for lag in lags])


def _row_strips(lines: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Blocks of the second axis for rows at the rim and their partners below, ``[strips, taps², C, C]``."""
    held, (_, batch, long, channels) = places(rows), lines.shape
    reach, taps, step = columns.reach, columns.taps, long * channels
    width, around = columns.size, 2 * reach + 1
    sums, rims_of = [], []
    for place, lag in (rims(rows).strips[index] for index in downward(rows)):
        here, there = lines[held.index(place)], lines[held.index(place + lag * rows.dilation)]
        left = here[:, reach : reach + width].permute(1, 2, 0)
        right = there.as_strided((width, batch, around * channels), (channels, step, 1), there.storage_offset())
        products = torch.bmm(left, right).view(width, channels, around, channels)
        products = products[:, :, :: columns.dilation].transpose(1, 2)  # [W, lags, C, C]
        sums.append(products.sum(0))
        rims_of.append(products[strip_index(columns, lines.device)])
    if not sums:
        return lines.new_zeros(0, taps**2, channels, channels)
    return _subtract(_toeplitz(torch.stack(sums), taps), columns, torch.stack(rims_of))
