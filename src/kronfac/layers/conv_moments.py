"""Second moment of a convolution's rows without materialising them: the row-correlation form.

Let ``U_m`` hold, for input row ``m`` (a line of the first spatial dimension), the input unfolded along the other
spatial dimensions only.  The block of the moment for kernel lines ``i, i'`` is ``Σ_y U_{ys+id}ᵀ U_{ys+i'd}``: it
depends on ``i`` only through the window over which whole rows are correlated at the lag ``(i'-i)d``.  So one product
per lag is formed, and the window slides by subtracting and adding single boundary rows.  With a stride ``s`` the rows
of each residue class modulo ``s`` play this part.  Exact (2e-7 in float32), about ``1/k`` of im2col's flops and memory.

This is the plug-in estimate of ``Ω`` in Grosse & Martens 2016, equation (32), divided by its number of terms.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from kronfac.layers.conv_lags import add_by_lags_, lags_pay
from kronfac.layers.conv_lines import LinePair, add_block_, examples_at_once, line_pairs, unfold_lines, zero_padded
from kronfac.layers.geometry import Geometry, column_sums, im2col
from kronfac.linalg.symmetric import add_gram_, add_product_, summed_in_float32

#: Entries of whole patches held at once on an accelerator: 1 GB in float32.
PATCHES_ACCELERATOR = 1 << 28
#: Multiplications with whole patches that an accelerator is through with before the products of lines are launched.
LAUNCH_BOUND = 4e9


def _chain_cost(previous: LinePair | None, pair: LinePair) -> tuple[int, bool]:
    """Rows to multiply for a pair, and whether sliding from the previous one is cheaper than starting afresh."""
    direct = pair.stop - pair.start
    if previous is None or (previous.left, previous.right, previous.lag) != (pair.left, pair.right, pair.lag):
        return direct, False
    if pair.start >= previous.stop or pair.stop <= previous.start:
        return direct, False
    slide = abs(pair.start - previous.start) + abs(pair.stop - previous.stop)
    return (slide, True) if slide < direct else (direct, False)


@lru_cache(maxsize=256)
def row_correlation_pays(geometry: Geometry, size: tuple[int, ...]) -> bool:
    """Whether the row-correlation form needs fewer multiplications than im2col for this input size."""
    if geometry.kernel[0] == 1:
        return False
    out = geometry.output_size(size)
    cost, previous = 0, None
    for pair in line_pairs(geometry, size[0], out[0]):
        cost += _chain_cost(previous, pair)[0]
        previous = pair
    # im2col: kernel² blocks over every line, of which the symmetric product computes about 0.7 when it is wide.
    return cost < 0.7 * geometry.kernel[0] ** 2 * out[0]


def _correlate(left: Tensor, right: Tensor, symmetric: bool, channels: int) -> Tensor:
    """``Σ leftᵀ right`` over rows, examples and positions, for ``[groups, rows, N, X, F]``: ``[groups, F, F]``.

    With ``channels > 0`` the trailing dimension is one line of unit stride whose taps are neighbours: the block of taps
    ``(j+1, j'+1)`` is that of ``(j, j')`` less its first column of positions plus the next one, so that only the blocks
    of tap 0 with all others need whole products: ``(2k-1)/k²`` of the multiplications.

    Returns:
        The correlation, both triangles of it.
    """
    a, b = left.flatten(1, 3), right.flatten(1, 3)
    if a.shape[0] > 1:
        return a.mT @ b
    a, b, width = a[0], b[0], left.shape[-1]
    out = torch.zeros(width, width, dtype=torch.promote_types(a.dtype, torch.float32), device=a.device)
    if channels == 0:
        add_product_(out, a, b, symmetric=symmetric)
        return (out.triu() + out.triu(1).mT if symmetric else out).unsqueeze(0)
    add_product_(out[:channels], a[:, :channels], b)
    if symmetric:
        out[:, :channels] = out[:channels].T
    else:
        add_product_(out[channels:, :channels], a[:, channels:], b[:, :channels])
    edge = width - channels
    first, after = (0, slice(0, edge)), (left.shape[3] - 1, slice(channels, width))
    change = out.new_zeros(edge, edge)
    for (position, taps), sign in ((first, -1.0), (after, 1.0)):
        column, other = (side[0, :, :, position, taps].flatten(0, 1) for side in (left, right))
        add_product_(change, column, other, alpha=sign)
    for start in range(channels, width, channels):
        lines = slice(start, start + channels)
        before = slice(start - channels, start)
        torch.add(out[before, :edge], change[before], out=out[lines, channels:])
    return out.unsqueeze(0)


def _neighbour_taps(geometry: Geometry, channels: int) -> int:
    """Number of channels if sliding along the last dimension is possible and pays, else 0."""
    taps = geometry.kernel[-1]
    # One trailing dimension only: with two, positions at the edge of every line would have to be exchanged.
    possible = len(geometry.kernel) == 2 and geometry.groups == 1
    possible &= geometry.stride[-1] == 1 and geometry.dilation[-1] == 1
    # Thin products run at a lower rate: measured break-even.
    return channels if possible and ((taps >= 4 and channels >= 16) or (taps == 3 and channels >= 32)) else 0


def _increments(
    x: Tensor, geometry: Geometry, out: tuple[int, ...], pairs: tuple[LinePair, ...]
) -> list[Tensor | None]:
    """Correlation of each pair of kernel lines, as its change from the previous pair where sliding is cheaper."""
    unfolded = unfold_lines(x, geometry, out)
    neighbours = _neighbour_taps(geometry, x.shape[1] // geometry.groups)

    def product(pair: LinePair, start: int, stop: int) -> Tensor:
        (left, low), (right, right_low) = unfolded[pair.left], unfolded[pair.right]
        a = left[:, start - low : stop - low]
        b = right[:, start + pair.lag - right_low : stop + pair.lag - right_low]
        return _correlate(a, b, pair.lag == 0 and pair.left == pair.right, neighbours)

    found: list[Tensor | None] = []
    for previous, pair in pairwise((None, *pairs)):
        assert pair is not None
        if not (previous is not None and _chain_cost(previous, pair)[1]):
            found.append(product(pair, pair.start, pair.stop) if pair.stop > pair.start else None)
            continue
        change: Tensor | None = None
        # Rows that leave at the start of the window are subtracted, rows that enter at its end are added.
        for old, new, sign in ((previous.start, pair.start, -1), (previous.stop, pair.stop, 1)):
            if old != new:
                part = product(pair, min(old, new), max(old, new)).mul_(sign if new > old else -sign)
                change = part if change is None else change.add_(part)
        found.append(change)
    return found


def add_row_correlation_(total: Tensor, x: Tensor, geometry: Geometry, alpha: float = 1.0) -> None:
    """Add ``alpha Σ_r a_r a_rᵀ`` over all rows (without ones) to ``total``, both triangles.

    A bounded number of examples is unfolded at a time.

    Args:
        total: Running sum ``[groups, d, d]``.
        x: Input ``[N, C, *size]``.
        geometry: The convolution.
        alpha: Factor of what is added.
    """
    out = geometry.output_size(tuple(x.shape[2:]))
    x, flat = zero_padded(x, geometry)
    pairs = line_pairs(flat, x.shape[2], out[0])
    sums: list[Tensor | None] = [None] * len(pairs)
    for part in x.split(examples_at_once(x, flat, out)):
        for index, found in enumerate(_increments(part, flat, out, pairs)):
            held = sums[index]
            sums[index] = found if held is None else held if found is None else held.add_(found)

    current: Tensor | None = None
    for previous, pair, change in zip((None, *pairs), pairs, sums, strict=False):
        slides = previous is not None and _chain_cost(previous, pair)[1]
        if not slides:
            current = change
        elif change is not None:
            current = change if current is None else current.add_(change)
        if current is not None:
            add_block_(total, current, pair, geometry, alpha)


def add_whole_patches_(
    total: Tensor, x: Tensor, geometry: Geometry, alpha: float = 1.0, *, ones: bool = False
) -> Tensor | None:
    """Add ``alpha Σ_r a_r a_rᵀ`` over all rows (without ones) to the upper triangle of ``total``, from the rows.

    Args:
        total: Running sum ``[groups, d, d]``.
        x: Input ``[N, C, *size]``.
        geometry: The convolution.
        alpha: Factor of what is added.
        ones: Whether the sum of the rows is wanted.

    Returns:
        ``Σ_r a_r``, ``[groups, d]``, or None.
    """
    sums = None
    for part in x.split(_patches_at_once(x, geometry)):
        rows = im2col(part, geometry).flatten(0, 1).movedim(1, 0)
        if rows.shape[0] == 1:
            add_gram_(total[0], rows[0], alpha=alpha)
        else:
            add_gram_(total, rows, alpha=alpha)
        if ones:
            found = rows.sum(1, dtype=total.dtype)
            sums = found if sums is None else sums.add_(found)
    return sums


def _patches_at_once(x: Tensor, geometry: Geometry) -> int:
    """Number of examples whose patches are held together: all on a CPU, where they are formed for small maps alone."""
    if x.device.type == "cpu":
        return max(1, x.shape[0])
    entries = math.prod(geometry.output_size(tuple(x.shape[2:]))) * x.shape[1] * math.prod(geometry.kernel)
    return max(1, PATCHES_ACCELERATOR // entries)


def _lines_pay(x: Tensor, geometry: Geometry) -> bool:
    """Whether kernel lines are cheaper than whole patches."""
    if not row_correlation_pays(geometry, tuple(x.shape[2:])):
        return False
    if x.device.type == "cpu":
        return True
    channels = x.shape[1] // geometry.groups
    rows = x.shape[0] * math.prod(geometry.output_size(tuple(x.shape[2:])))
    work = rows * geometry.groups * (channels * math.prod(geometry.kernel)) ** 2
    # On a GPU (benchmarks/gpu_forms.py) the matrix units are through with patches of 16 bits before lines are cut out,
    # and lines of few channels are too narrow for it.
    return channels >= 16 and work >= LAUNCH_BOUND and not summed_in_float32(x)


def add_conv_gram_(total: Tensor, x: Tensor, geometry: Geometry, *, ones: bool, alpha: float = 1.0) -> float:
    """Add ``alpha Σ_r ā_r ā_rᵀ`` of a convolution to the upper triangle of ``total``, in the cheapest exact form.

    Args:
        total: Running sum ``[groups, d, d]``.
        x: Input ``[N, C, *size]``.
        geometry: The convolution.
        ones: Whether rows end with the bias's one.
        alpha: Factor of what is added.

    Returns:
        The number of rows.
    """
    inner = total[:, :-1, :-1] if ones else total
    count = float(x.shape[0] * math.prod(geometry.output_size(tuple(x.shape[2:]))))
    if lags_pay(x, geometry):
        add_by_lags_(inner[0], x, geometry, alpha)
        sums = column_sums(x, geometry) if ones else None
    elif _lines_pay(x, geometry):
        add_row_correlation_(inner, x, geometry, alpha)
        sums = column_sums(x, geometry) if ones else None
    else:
        sums = add_whole_patches_(inner, x, geometry, alpha, ones=ones)
    if sums is not None:
        total[:, :-1, -1].add_(sums, alpha=alpha)
        total[:, -1, -1] += alpha * count
    return count
