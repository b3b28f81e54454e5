"""Products of wide float32 matrices by oneDNN, on processors where MKL lags behind it.

PyTorch multiplies float32 matrices on a CPU by MKL, which takes AVX2 on processors of other makers even where they have
AVX-512. oneDNN, which PyTorch brings for its convolutions, does not ask who made them: on such a processor it takes
half of MKL's time, for the same sums in float32.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

#: Least side of a product that pays.
LEAST = 8
#: Least number of multiplications: a call of oneDNN takes some 13 microseconds.
_WORK = 1 << 21
#: Longest sums that oneDNN takes in stride.
_LONGEST = 4096
#: Height of a panel of a triangle, which must be as wide, and the rows that are summed at least and at once.
_PANEL, _FEWEST, _ROWS = 192, 64, 2048


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices as ``@`` does, by the faster library where no gradients are wanted.

    Args:
        left: Shape ``[..., m, k]``.
        right: Shape ``[..., k, n]``.

    Returns:
        Shape ``[..., m, n]``.
    """
    if not pays(left, right):
        return left @ right
    # For a right one with gaps between its rows, oneDNN has slow loops alone.
    dense = right.is_contiguous() or right.mT.is_contiguous()
    return _onednn(left, (right if dense else right.contiguous()).mT)


def add_triangle_(total: Tensor, left: Tensor, right: Tensor, alpha: float) -> bool:
    """Add the upper triangle of ``alpha * leftᵀ right``, which is symmetric, by oneDNN where that is faster.

    Args:
        total: Running sum, ``[d, d]``; changed in place.
        left: Shape ``[R, d]``.
        right: Shape ``[R, d]``.
        alpha: Factor of the product.

    Returns:
        Whether it was; if not, nothing was added.
    """
    width = total.shape[0]
    if width < _PANEL or len(right) < _FEWEST or not _served(left, right, total):
        return False
    panels = max(round(width / _PANEL), 1)
    edges = [width * i // panels for i in range(panels + 1)]
    for some, others in zip(left.split(_ROWS), right.split(_ROWS), strict=True):
        columns = some.T.contiguous()
        across = columns if left is right else others.T.contiguous()
        for start, stop in pairwise(edges):
            total[start:stop, start:].add_(_onednn(columns[start:stop], across[start:]), alpha=alpha)
    return True


def _onednn(left: Tensor, transposed: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(left, transposed, None, "none", [], "")


def pays(left: Tensor, right: Tensor) -> bool:
    """Whether :func:`matmul` takes oneDNN for two matrices.

    Args:
        left: The left one.
        right: The right one.

    Returns:
        True for two wide ones in float32 on a processor where it is the faster one.
    """
    if not _served(left, right):
        return False
    (m, k), n = left.shape, right.shape[1]
    return min(m, k, n) >= LEAST and m * k * n >= _WORK and k <= _LONGEST


def _served(*matrices: Tensor) -> bool:
    """Whether they are matrices in float32 on such a CPU, of no subclass with products of its own, without a graph."""
    if torch.is_grad_enabled() or not outruns_mkl():
        return False
    return all(
        type(m) in (Tensor, nn.Parameter) and m.ndim == 2 and m.dtype == torch.float32 and m.device.type == "cpu"
        for m in matrices
    )


@lru_cache(maxsize=1)
def outruns_mkl() -> bool:
    """Whether oneDNN multiplies faster than MKL here.

    Returns:
        True for AMD's processors with AVX-512.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        told = platform.processor()  # Windows tells the maker here
    return "AuthenticAMD" in told
