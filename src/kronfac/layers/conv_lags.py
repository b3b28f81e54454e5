"""Second moment of a convolution's rows from autocorrelations: one library call for all lags, strips for the rims.

With unit stride the block of taps ``t, t'`` is ``Σ x_p x_{p+δ}ᵀ`` over the positions ``p`` that tap ``t`` reads, with
the lag ``δ = t' - t``.  If every tap read the whole map it would depend on the lag alone: ``k(2k-1)`` products instead
of ``k⁴/2``.  These autocorrelations are what a library's weight gradient computes for a kernel of ``k × (2k-1)`` taps
with the map as input *and* as gradient, and it does so without unfolding anything.  What taps miss lies in a few rows
and columns at the rim; their products are subtracted.

Exact to rounding of the largest entry: sums are cut into parts of :data:`POSITIONS`, and between examples, since the
weight gradient adds one position after the other (4e-7 in float32 then, 1e-6 on one thread; 1e-5 in one piece of
131 072 positions).  Entries that are small because their taps miss most of what a channel holds, rows at the rim that
outshine the rest, keep the error of the whole sum.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from kronfac.layers.conv_rims import Axis, across_table, axes, downward, downward_table, places, rims
from kronfac.layers.geometry import Geometry

#: Positions summed by one call of the weight gradient.
POSITIONS = 1 << 15
#: The same of a dilated kernel, whose gradient adds up longer chains.
POSITIONS_DILATED = 1 << 12
#: Channels from which on the weight gradient is efficient; below it vector registers stay empty.
LEAST_CHANNELS = 16
#: Channels up to which products of segments are the cheapest form where there is no exact weight gradient.
MOST_IN_SEGMENTS = 32
#: Channels up to which the strips at the rims stay cheap.
MOST_CHANNELS = 256
#: Entries of a padded map that are copied at once where the lags are matrix products.
ENTRIES = 1 << 20
#: An axis of one place.
_POINT = Axis(size=1, out=1, taps=1, dilation=1, pad=0)


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
    pieces = _pieces(x, rows, columns)
    blocks = across_table(columns, x.dtype, x.device) @ pieces.flatten(2)
    blocks = downward_table(rows, x.dtype, x.device) @ blocks.flatten(1)
    total = total.unflatten(-1, (channels, rows.taps, taps)).unflatten(0, (channels, rows.taps, taps))
    parts = blocks.view(-1, taps, taps, channels, channels).split([rows.taps - lag for lag in range(rows.taps)])
    for lag, part in enumerate(parts):
        # Blocks of the pairs of kernel lines (i, i + lag), for all i.
        total.diagonal(lag, 1, 4).add_(part.permute(3, 1, 4, 2, 0), alpha=alpha)
        if lag:
            total.diagonal(-lag, 1, 4).add_(part.permute(4, 2, 3, 1, 0), alpha=alpha)


def gradient_is_exact(x: Tensor) -> bool:
    """Whether a weight gradient of this input is computed in full float32 by an optimised library."""
    # Without AVX-512 its sums lose five times as much (2e-6), and it is no faster than products of segments.
    if x.device.type != "cpu" or x.dtype != torch.float32 or not torch.backends.mkldnn.enabled:
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    precision = torch.backends.mkldnn.conv.fp32_precision  # type: ignore[attr-defined]
    return torch.backends.mkldnn.is_available() and precision in ("none", "ieee")


def _pieces(x: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Make all products that blocks are sums of.

    Returns:
        ``[k_1 + strips, 2 k_2 - 1 + strips, C, C]``: along each axis its lags, downwards from zero on and to the right
        from the least on, then the strips at its rims. Lags of both run over the whole map, strips of both are corners.
    """
    batch, channels, height, width = x.shape
    across, down = rims(columns).strips, [rims(rows).strips[index] for index in downward(rows)]
    pieces = x.new_empty(rows.taps + len(down), 2 * columns.taps - 1 + len(across), channels, channels)
    whole, upright = pieces[: rows.taps].split([2 * columns.taps - 1, len(across)], dim=1)
    lines, corners = pieces[rows.taps :].split([2 * columns.taps - 1, len(across)], dim=1)

    by_gradient = channels >= LEAST_CHANNELS and gradient_is_exact(x)
    positions = POSITIONS if rows.dilation == columns.dilation == 1 else POSITIONS_DILATED
    at_once = positions // (height * width) if by_gradient else ENTRIES // (height * width * channels)
    form, along = (_map_by_gradient, _lines_by_gradient) if by_gradient else (_map_by_segments, _lines_by_products)
    sides = {place: x.new_empty(batch, height, channels) for place in places(columns)}
    ends = {place: x.new_empty(batch, width, channels) for place in places(rows)}
    start = 0
    for part in x.split(max(1, at_once)):
        image = part.permute(0, 2, 3, 1).contiguous()
        found = form(image, rows, columns)
        whole.add_(found) if start else whole.copy_(found)
        # The rims are taken where the map lies in the cache with its channels last.
        examples = slice(start, start := start + len(image))
        for place, side in sides.items():
            side[examples] = image[:, :, place]
        for place, end in ends.items():
            end[examples] = image[:, place]

    beside = [(place, place + lag * columns.dilation) for place, lag in across]
    below = [(place, place + lag * rows.dilation) for place, lag in down]
    if across:
        upright.copy_(along([(sides[p], sides[q]) for p, q in beside], rows)[:, rows.taps - 1 :].transpose(0, 1))
    if down:
        lines.copy_(along([(ends[p], ends[q]) for p, q in below], columns))
    if across and down:
        first, second = (torch.stack([ends[pair[i]][:, side[i]] for pair in below for side in beside]) for i in (0, 1))
        corners.copy_(torch.bmm(first.mT, second).view_as(corners))
    return pieces


def _by_gradient(here: Tensor, there: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """``Σ_p here_p there_{p+δ}ᵀ`` of contiguous maps ``[N, H, W, C]``, the second with ``rows.reach`` more rows.

    Returns:
        At all lags ``δ``, downwards from zero on and to the right from the least on: ``[k_1, 2 k_2 - 1, C, C]``.
    """
    # The library adds fewest terms in a row with channels last.
    channels = here.shape[3]
    weight = here.new_empty(channels, rows.taps, 2 * columns.taps - 1, channels)
    found = torch.ops.aten.convolution_backward(
        here.permute(0, 3, 1, 2),
        there.permute(0, 3, 1, 2),
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
    return found.permute(2, 3, 0, 1)


def _map_by_gradient(image: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Products of a map with itself at all lags, as :func:`_by_gradient` gives them."""
    return _by_gradient(image, F.pad(image, (0, 0, 0, 0, 0, rows.reach)), rows, columns)


def _lines_by_gradient(pairs: list[tuple[Tensor, Tensor]], axis: Axis) -> Tensor:
    """Products of lines ``[N, length, C]`` with others at all lags along them: ``[pairs, lags, C, C]``."""
    at_once = max(1, POSITIONS // axis.size)
    found = []
    for pair in pairs:
        parts = zip(*(line.unsqueeze(1).split(at_once) for line in pair), strict=True)
        products = [_by_gradient(here, there, _POINT, axis)[0] for here, there in parts]
        found.append(products[0] if len(products) == 1 else torch.stack(products).sum(0))
    return torch.stack(found)


def _lines_by_products(pairs: list[tuple[Tensor, Tensor]], axis: Axis) -> Tensor:
    """The same by one product for each pair."""
    found = []
    for here, there in pairs:
        channels = here.shape[2]
        windows = F.pad(there, (0, 0, axis.reach, axis.reach)).unfold(1, axis.size, axis.dilation)
        windows = windows.permute(0, 3, 1, 2).reshape(-1, windows.shape[1] * channels)
        found.append((here.flatten(0, 1).T @ windows).view(channels, -1, channels).transpose(0, 1))
    return torch.stack(found)


def _map_by_segments(image: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """The same of a map by products of segments of a row with what is around them; lags lie on their diagonals."""
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
