"""Second moment of a convolution's rows with a weight of their own at every position, and the rows' norms.

The weights forbid the row-correlation form of :mod:`kronfac.layers.conv_moments`: a window that slides over rows keeps
its inner rows only where they count alike.  What remains exact is one product for each pair of kernel lines, of the
input unfolded along the other dimensions alone, the weights folded once into the left side: ``(k+1)/2k`` of im2col's
multiplications, less those with rows and columns of padding, and ``1/k`` of its memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from kronfac.layers.conv_lines import (
    LinePair,
    add_block_,
    examples_at_once,
    line_pairs,
    unfold_lines,
    zero_padded,
)
from kronfac.layers.geometry import Geometry
from kronfac.linalg.symmetric import add_product_

#: Entries of whole patches, and least number of patches, held at once: what the second-level cache of a core holds.
PATCH_ENTRIES, PATCH_ROWS = 1 << 18, 1 << 11
#: The same for an accelerator: 128 MB in float32.
PATCH_ENTRIES_ACCELERATOR = 1 << 25
#: Narrower rows are formed whole: products of their single kernel lines would run at a low rate.
NARROW = 64
#: Height of the panels of a symmetric product of lines, the best of 32, 40, 80 and 160 for a width of 160.
PANEL = 80


def add_weighted_conv_gram_(
    total: Tensor, x: Tensor, geometry: Geometry, weights: Tensor, *, ones: bool, alpha: float = 1.0
) -> Tensor:
    """Add ``alpha Σ_r w_r ā_r ā_rᵀ`` of a convolution to the upper triangle of ``total``.

    A bounded number of examples is unfolded at a time.

    Args:
        total: Running sum ``[groups, d, d]``.
        x: Input ``[N, C, *size]``.
        geometry: The convolution.
        weights: Weight of every position, ``[N, T]``, or ``[N, T, groups]`` where groups differ.
        ones: Whether rows end with the bias's one.
        alpha: Factor of what is added.

    Returns:
        ``Σ_r w_r``.
    """
    inner = total[:, :-1, :-1] if ones else total
    weights = weights.to(x.dtype).reshape(*weights.shape[:2], -1)
    width = inner.shape[-1] // geometry.kernel[0]
    # An accelerator prefers few large products.
    lines = width >= NARROW and geometry.kernel[0] > 1 and x.device.type == "cpu"
    add = _add_lines_ if lines else _add_patches_
    sums = add(inner, x, geometry, weights, alpha)
    if ones:
        total[:, :-1, -1].add_(sums, alpha=alpha)
        total[:, -1, -1].add_(weights.sum((0, 1)), alpha=alpha)
    return weights.sum()


def _add_patches_(total: Tensor, x: Tensor, geometry: Geometry, weights: Tensor, alpha: float) -> Tensor:
    """Add the moment by whole patches; return the weighted sum of rows ``[groups, d]``."""
    sums = total.new_zeros(total.shape[:2])
    entries = PATCH_ENTRIES if x.device.type == "cpu" else PATCH_ENTRIES_ACCELERATOR
    rows = max(PATCH_ROWS, entries // (total.shape[0] * total.shape[-1]))
    at_once = max(1, rows // max(1, weights.shape[1]))
    for part, weight in zip(x.split(at_once), weights.split(at_once), strict=True):
        columns = _patch_columns(part, geometry)
        left = columns * weight.flatten(0, 1).T.unsqueeze(1)
        sums += left.sum(-1)
        if len(columns) == 1:
            add_product_(total[0], left[0].T, columns[0].T, alpha=alpha, symmetric=True)
        else:
            add_product_(total, left.mT, columns.mT, alpha=alpha)
    return sums


def _patch_columns(x: Tensor, geometry: Geometry) -> Tensor:
    """Rows of a convolution as columns ``[groups, d, N·T]``: copied along lines of the image, not across them."""
    out = geometry.output_size(tuple(x.shape[2:]))
    x = geometry.pad(x)
    per_group = x.shape[1] // geometry.groups
    s_n, s_c, *strides = x.stride()
    step = [a * m for a, m in zip(strides, geometry.stride, strict=True)]
    tap = [a * m for a, m in zip(strides, geometry.dilation, strict=True)]
    view = x.as_strided(
        (geometry.groups, per_group, *geometry.kernel, len(x), *out), (s_c * per_group, s_c, *tap, s_n, *step)
    )
    return view.reshape(geometry.groups, per_group * math.prod(geometry.kernel), len(x) * math.prod(out))


def _add_lines_(total: Tensor, x: Tensor, geometry: Geometry, weights: Tensor, alpha: float) -> Tensor:
    """Add the moment by pairs of kernel lines; return the weighted sum of rows ``[groups, d]``."""
    out = geometry.output_size(tuple(x.shape[2:]))
    x, flat = zero_padded(x, geometry)
    lines, taps = flat.kernel[0], math.prod(flat.kernel[1:])
    channels = x.shape[1] // flat.groups
    pairs = tuple(sorted(line_pairs(flat, x.shape[2], out[0]), key=lambda pair: (pair.i, pair.j)))
    products = [total.new_zeros(flat.groups, taps * channels, taps * channels) for _ in pairs]
    sums = total.new_zeros(flat.groups, lines, taps * channels)
    # [groups or 1, lines of positions, N, positions of a line], as the unfolded rows have it.
    weights = weights.unflatten(1, (out[0], math.prod(out[1:]))).permute(3, 1, 0, 2)
    at_once = examples_at_once(x, flat, out)
    for part, weight in zip(x.split(at_once), weights.split(at_once, dim=2), strict=True):
        unfolded = unfold_lines(part, flat, out)
        for first, last, low, high in _stretches(flat, tuple(x.shape[2:])):
            cut = slice(low * channels, high * channels)
            rows = {key: (u[..., first:last, cut].flatten(2, 3), start) for key, (u, start) in unfolded.items()}
            into = [product[:, cut, cut] for product in products]
            _add_stretch_(into, sums[..., cut], rows, weight[..., first:last].flatten(2, 3), pairs, flat)
    for pair, product in zip(pairs, products, strict=True):
        if pair.i == pair.j:
            product = product.triu() + product.triu(1).mT
        add_block_(total, product, pair, flat, alpha)
    return sums.unflatten(-1, (taps, channels)).permute(0, 3, 1, 2).flatten(1)


@lru_cache(maxsize=256)
def _stretches(geometry: Geometry, size: tuple[int, ...]) -> tuple[tuple[int, int, int, int], ...]:
    """Neighbouring positions of a line whose patches hold the same taps; the other taps lie on padding.

    Args:
        geometry: The convolution.
        size: Spatial size of its input.

    Returns:
        ``(first, last, low tap, high tap)`` of each stretch; one stretch where leaving taps out would save little.
    """
    positions, taps = math.prod(geometry.output_size(size)[1:]), math.prod(geometry.kernel[1:])
    whole = ((0, positions, 0, taps),)
    if len(size) != 2:
        return whole
    stride, dilation, pad = geometry.stride[1], geometry.dilation[1], geometry.padding[1][0]
    found: list[tuple[int, int, int, int]] = []
    for position in range(positions):
        column = position * stride - pad  # of the image, under tap 0
        low = min(taps, max(0, -(column // dilation)))
        high = max(low, min(taps, (size[1] - 1 - column) // dilation + 1))
        begin = found.pop()[0] if found and found[-1][2:] == (low, high) else position
        found.append((begin, position + 1, low, high))
    kept = sum((last - first) * (high - low) ** 2 for first, last, low, high in found)
    return tuple(found) if kept < 0.95 * positions * taps**2 else whole


def _add_stretch_(
    products: list[Tensor],
    sums: Tensor,
    rows: Mapping[int, tuple[Tensor, int]],
    weights: Tensor,
    pairs: tuple[LinePair, ...],
    geometry: Geometry,
) -> None:
    """Add one stretch of positions.

    Args:
        products: ``[groups, F, F]`` for each pair, changed in place.
        sums: Weighted sums of rows ``[groups, lines, F]``, changed in place.
        rows: Unfolded rows ``[groups, rows, R, F]`` of each residue class, and the number of the first.
        weights: ``[groups or 1, lines of positions, R]``.
        pairs: The pairs of kernel lines, those of one left line after each other and beginning with itself.
        geometry: The convolution.
    """
    for product, pair in zip(products, pairs, strict=True):
        if pair.i == pair.j:  # the widest range of its line
            (own, low), above = rows[pair.left], pair.i * geometry.dilation[0] // geometry.stride[0]
            first, weight = pair.start, weights[:, pair.start - above : pair.stop - above].unsqueeze(-1)
            weighted = own[:, pair.start - low : pair.stop - low] * weight
            sums[:, pair.i] += weighted.sum((1, 2))
        other, low = rows[pair.right]
        left = weighted[:, pair.start - first : pair.stop - first].flatten(1, 2)
        right = other[:, pair.start + pair.lag - low : pair.stop + pair.lag - low].flatten(1, 2)
        _add_line_product_(product, left, right, symmetric=pair.i == pair.j)


def _add_line_product_(total: Tensor, left: Tensor, right: Tensor, *, symmetric: bool) -> None:
    """Add ``leftᵀ right`` for ``[groups, R, m]``, by panels where only the upper triangle is needed."""
    if len(total) > 1:
        total.add_(left.mT @ right)
        return
    width = total.shape[-1]
    panels = max(1, round(width / PANEL)) if symmetric else 1
    for start, stop in pairwise(width * i // panels for i in range(panels + 1)):
        after = start if symmetric else 0
        total[0, start:stop, after:].addmm_(left[0, :, start:stop].T, right[0, :, after:])


def row_norms(x: Tensor, geometry: Geometry) -> Tensor:
    """Squared norm of every row (without ones), by sliding sums over the squared image instead of from patches.

    Args:
        x: Input ``[N, C, *size]``.
        geometry: The convolution.

    Returns:
        Shape ``[N, T, groups]``.
    """
    image = geometry.pad(x.unflatten(1, (geometry.groups, -1)).square().sum(2))
    out = geometry.output_size(tuple(x.shape[2:]))
    sizes = zip(out, geometry.kernel, geometry.stride, geometry.dilation, strict=True)
    for dim, (length, kernel, stride, dilation) in enumerate(sizes, 2):
        steps = torch.arange(length, device=x.device) * stride
        image = torch.stack([image.index_select(dim, steps + tap * dilation) for tap in range(kernel)]).sum(0)
    return image.flatten(2).mT
