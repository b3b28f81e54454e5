"""Second moment of a convolution's rows with a weight of their own at every position, and the rows' norms.

The weights forbid the row-correlation form of :mod:`kronfac.layers.conv_moments`: a window that slides over rows keeps
its inner rows only where they count alike.  What remains exact is one product for each pair of kernel lines, of the
input unfolded along the other dimensions alone, the weights folded once into the left side: ``(k+1)/2k`` of im2col's
multiplications less those with rows of padding, and ``1/k`` of its memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kronfac.layers.conv_lines import UNFOLDED, add_block_, examples_at_once, line_pairs, unfold_lines, zero_padded
from kronfac.layers.geometry import Geometry, im2col
from kronfac.linalg.symmetric import PANEL, add_product_


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
    # Lines pay where their products are wide enough; a narrow layer is one product of whole patches.
    add = _add_lines_ if inner.shape[-1] >= 2 * PANEL and geometry.kernel[0] > 1 else _add_patches_
    sums = add(inner, x, geometry, weights, alpha)
    if ones:
        total[:, :-1, -1].add_(sums, alpha=alpha)
        total[:, -1, -1].add_(weights.sum((0, 1)), alpha=alpha)
    return weights.sum()


def _add_patches_(total: Tensor, x: Tensor, geometry: Geometry, weights: Tensor, alpha: float) -> Tensor:
    """Add the moment by whole patches; return the weighted sum of rows ``[groups, d]``."""
    sums = total.new_zeros(total.shape[:2])
    per_example = total.shape[0] * total.shape[-1] * weights.shape[1]
    at_once = max(1, UNFOLDED // max(1, per_example))
    for part, weight in zip(x.split(at_once), weights.split(at_once), strict=True):
        rows = im2col(part, geometry).flatten(0, 1).movedim(1, 0)
        left = rows * weight.flatten(0, 1).movedim(1, 0).unsqueeze(-1)
        sums += left.sum(1)
        if len(rows) == 1:
            add_product_(total[0], left[0], rows[0], alpha=alpha, symmetric=True)
        else:
            add_product_(total, left, rows, alpha=alpha)
    return sums


def _add_lines_(total: Tensor, x: Tensor, geometry: Geometry, weights: Tensor, alpha: float) -> Tensor:
    """Add the moment by pairs of kernel lines; return the weighted sum of rows ``[groups, d]``."""
    out = geometry.output_size(tuple(x.shape[2:]))
    x, flat = zero_padded(x, geometry)
    lines, taps, dilation = flat.kernel[0], math.prod(flat.kernel[1:]), flat.dilation[0]
    channels = x.shape[1] // flat.groups
    pairs = sorted(line_pairs(flat, x.shape[2], out[0]), key=lambda pair: (pair.i, pair.j))
    width = taps * channels
    products = [total.new_zeros(flat.groups, width, width) for _ in pairs]
    sums = total.new_zeros(flat.groups, lines, width)
    # [groups or 1, lines of positions, N, positions of a line, 1], as the unfolded rows have it.
    weights = weights.unflatten(1, (out[0], math.prod(out[1:]))).permute(3, 1, 0, 2).unsqueeze(-1)
    at_once = examples_at_once(x, flat, out)
    for part, weight in zip(x.split(at_once), weights.split(at_once, dim=2), strict=True):
        unfolded = unfold_lines(part, flat, out)
        for index, pair in enumerate(pairs):
            if pair.i == pair.j:  # comes first of its line, and with the widest range
                first, (rows, low) = pair.start, unfolded[pair.left]
                above = pair.i * dilation // flat.stride[0]
                weighted = (
                    rows[:, pair.start - low : pair.stop - low] * weight[:, pair.start - above : pair.stop - above]
                )
                sums[:, pair.i] += weighted.sum((1, 2, 3))
            rows, low = unfolded[pair.right]
            left = weighted[:, pair.start - first : pair.stop - first].flatten(1, 3)
            right = rows[:, pair.start + pair.lag - low : pair.stop + pair.lag - low].flatten(1, 3)
            if flat.groups == 1:
                add_product_(products[index][0], left[0], right[0], symmetric=pair.i == pair.j)
            else:
                add_product_(products[index], left, right)
    for pair, product in zip(pairs, products, strict=True):
        if pair.i == pair.j:
            product = product.triu() + product.triu(1).mT
        add_block_(total, product, pair, flat, alpha)
    return sums.unflatten(-1, (taps, channels)).permute(0, 3, 1, 2).flatten(1)


def row_norms(x: Tensor, geometry: Geometry) -> Tensor:
    """Squared norm of every row (without ones), by sliding sums over the squared image instead of from patches.

    Args:
        x: Input ``[N, C, *size]``.
        geometry: The convolution.

    Returns:
        Shape ``[N, T, groups]``.
    """
    image = geometry.pad(x.unflatten(1, (geometry.groups, -1)).square().sum(2))
    sizes = zip(
        geometry.output_size(tuple(x.shape[2:])), geometry.kernel, geometry.stride, geometry.dilation, strict=True
    )
    for dim, (out, kernel, stride, dilation) in enumerate(sizes, 2):
        steps = torch.arange(out, device=x.device) * stride
        parts = (image.index_select(dim, steps + tap * dilation) for tap in range(kernel))
        image = sum(parts, start=image.new_zeros(()))
    return image.flatten(2).mT
