"""Symmetric products at about half the flops of a full one.

PyTorch offers no ``syrk``.  On the CPU the upper triangle is accumulated as panels of :data:`PANEL` rows, straight into
the running sum: 0.65 times the time of the full product at width 1000, on a par with the BLAS routine.  On a GPU
panels are higher, and narrower products one kernel.

Rows of 16 bits, as autocast makes them, are multiplied as they are on a GPU, where the sums are taken in float32: the
result is that of the same rows in float32, and the matrix units' rate ten times higher.

A matrix accumulated here is valid in its **upper** triangle only, until :func:`mirror_` completes it.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from kronfac.linalg.products import add_triangle_, matmul, outruns_mkl, pays

#: Height of a panel, the best of 96, 128, 192 and 256 for widths 250 to 1000, on one thread and on two.
PANEL = 96
#: The same on a GPU.
PANEL_GPU = 512

#: Columns that are few, and into how many parts their rows are cut then.
NARROW, PARTS = 15, 64

_HALF = (torch.bfloat16, torch.float16)


def summed_in_float32(rows: Tensor) -> bool:
    """Whether products of these rows of 16 bits are summed in float32.

    Args:
        rows: The rows.

    Returns:
        True for rows of 16 bits on a CUDA device.
    """
    return rows.dtype in _HALF and rows.device.type == "cuda"


def add_gram_(total: Tensor, rows: Tensor, *, weights: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """Add ``alpha * rowsᵀ diag(weights) rows`` to the upper triangle of ``total``, in place.

    Args:
        total: Running sum of shape ``[d, d]`` or ``[*stack, d, d]``.
        rows: Rows of shape ``[R, d]`` or ``[*stack, R, d]``.
        weights: Optional weight of each row, shape ``[R]``.
        alpha: Factor of the product.

    Returns:
        ``total``, of which only the upper triangle is meaningful.
    """
    left = rows if weights is None else rows * weights.to(rows.dtype).unsqueeze(-1)
    return add_product_(total, left, rows, alpha=alpha, symmetric=True)


def add_product_(total: Tensor, left: Tensor, right: Tensor, *, alpha: float = 1.0, symmetric: bool = False) -> Tensor:
    """Add ``alpha * leftᵀ right`` to ``total`` in place.

    Args:
        total: Running sum of shape ``[*stack, m, n]``; it may be a strided view.
        left: Shape ``[*stack, R, m]``.
        right: Shape ``[*stack, R, n]``.
        alpha: Factor of the product.
        symmetric: The product is known to be symmetric; only its upper triangle need be written.

    Returns:
        ``total``.
    """
    if total.ndim > 2:
        return total.add_(left.mT @ right, alpha=alpha)
    if symmetric and add_triangle_(total, left, right, alpha):
        return total
    width, panel = total.shape[0], PANEL if total.device.type == "cpu" else PANEL_GPU
    if not symmetric or width < 2 * panel:
        return _add_(total, left, right, alpha)
    panels = round(width / panel)
    edges = [width * i // panels for i in range(panels + 1)]
    for start, stop in pairwise(edges):
        _add_(total[start:stop, start:], left[:, start:stop], right[:, start:], alpha)
    return total


def _add_(total: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    if summed_in_float32(right):
        return total.add_(torch.mm(left.T, right, out_dtype=torch.float32), alpha=alpha)
    if pays(left.T, right):
        return total.add_(matmul(left.T, right), alpha=alpha)
    size = len(right) // PARTS
    if min(total.shape) <= NARROW and size >= PARTS and right.dtype == torch.float32 and right.device.type == "cpu":
        # MKL adds few columns up row by row, with an error that grows with the rows.
        parts = [rows[: size * PARTS].reshape(PARTS, size, -1) for rows in (left, right)]
        total.add_((parts[0].mT @ parts[1]).sum(0), alpha=alpha)
        left, right = left[size * PARTS :], right[size * PARTS :]
    return total.addmm_(left.T, right, alpha=alpha)


def mirror_(matrix: Tensor) -> Tensor:
    """Copy the upper triangle of ``[*stack, d, d]`` onto the lower one, in place, and return it."""
    if matrix.device.type != "cpu":
        return matrix.triu_().add_(matrix.triu(1).mT)
    width = matrix.shape[-1]
    # Panel by panel: one temporary of PANEL rows instead of two of the whole matrix.
    for start in range(0, width, PANEL):
        stop = min(start + PANEL, width)
        matrix[..., stop:, start:stop] = matrix[..., start:stop, stop:].mT
        corner = matrix[..., start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).mT)
    return matrix


def with_even_rows(matrix: Tensor) -> Tensor:
    """Copy a wide matrix on the CPU so that each of its rows begins at a multiple of 64 bytes.

    Products with factors of 785 or 1001 columns, one of them the bias's, take 0.85 of the time then.

    Args:
        matrix: Shape ``[*stack, m, n]``.

    Returns:
        A copy of the same shape with other strides, or the matrix itself where there is nothing to gain.
    """
    if not is_wide(matrix):
        return matrix
    columns, whole = matrix.shape[1], 64 // matrix.dtype.itemsize
    if matrix.stride(1) == 1 and matrix.stride(0) % whole == 0:
        return matrix
    return matrix.new_empty(matrix.shape[0], row_step(columns, matrix.dtype))[:, :columns].copy_(matrix)


def is_wide(matrix: Tensor) -> bool:
    """Whether even rows pay: a single matrix of some hundred columns on the CPU, which MKL multiplies."""
    single = matrix.device.type == "cpu" and matrix.ndim == 2 and matrix.shape[1] >= 2 * PANEL
    return single and not (matrix.dtype == torch.float32 and outruns_mkl())


def row_step(columns: int, dtype: torch.dtype) -> int:
    """Entries from one row to the next if each begins at a multiple of 64 bytes, and not all at the same in a page."""
    whole = 64 // dtype.itemsize
    step = -(-columns // whole) * whole
    return step + whole if step * dtype.itemsize % 4096 == 0 else step


def all_finite(*tensors: Tensor) -> bool:
    """Whether every entry is finite, by one reduction of each tensor and one read for all that share a device.

    Args:
        *tensors: Floating point; an overflowing sum is looked at again.

    Returns:
        True if so; true of none.
    """
    sums: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        sums.setdefault(tensor.device, []).append(tensor.sum())
    totals = [each[0] if len(each) == 1 else torch.stack([s.float() for s in each]).sum() for each in sums.values()]
    return all(map(_is_finite, totals)) or all(bool(tensor.isfinite().all()) for tensor in tensors)


def _is_finite(number: Tensor) -> bool:
    return math.isfinite(number.item())
