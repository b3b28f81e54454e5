"""Upper bounds of the Frobenius error of one layer's block (Gao et al. 2020, section 4.3).

The block is ``F = (1/N) Σ_i a_i a_iᵀ ⊗ u_i u_iᵀ``, with one row of input ``a`` and of cotangent ``u`` per example.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Pairs looked at together.
_PAIRS = 1 << 22


def tkfac_error_bound(a: Tensor, u: Tensor) -> Tensor:
    """Bound of ``|F - F_TKFAC|``: ``(N-1)/N max_{i<j} |a_i||a_j||u_i||u_j|``.

    Half of what Theorem 4.4 prints, whose proof loses a factor of two at the end: the norm of ``tr(Λ_j) Λ_i - tr(Λ_i)
    Λ_j`` is at most ``√2 tr(Λ_i) tr(Λ_j)``, not twice that. Two examples with orthogonal rows of equal norms attain it.

    Args:
        a: Input rows, ``[N, d_in]``.
        u: Cotangent rows, ``[N, d_out]``.

    Returns:
        A 0-dim tensor; zero for one example, where TKFAC is exact.
    """
    count = _check(a, u)
    norms = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(u, dim=1)
    return norms.new_zeros(()) if count == 1 else norms.topk(2).values.prod() * ((count - 1) / count)


def kfac_error_bound(a: Tensor, u: Tensor) -> Tensor:
    """Bound of ``|F - F_KFAC|``: ``(N-1)/(2N) max_{i<j} (|a_i|² + |a_j|²)(|u_i|² + |u_j|²)``.

    As printed below Theorem 4.4, and tight: two examples attain it if one has no input and the other no cotangent.

    Args:
        a: Input rows, ``[N, d_in]``.
        u: Cotangent rows, ``[N, d_out]``.

    Returns:
        A 0-dim tensor; zero for one example, where KFAC is exact.
    """
    count = _check(a, u)
    inputs, outputs = a.square().sum(1), u.square().sum(1)
    largest = inputs.new_zeros(())
    rows = max(1, _PAIRS // count)
    for start in range(0, count, rows):
        part = slice(start, min(start + rows, count))
        products = (inputs[part, None] + inputs) * (outputs[part, None] + outputs)
        products.diagonal(start).zero_()  # i = j is no pair
        largest = torch.maximum(largest, products.max())
    return largest * ((count - 1) / (2 * count))


def _check(a: Tensor, u: Tensor) -> int:
    if a.ndim != 2 or u.ndim != 2 or len(a) != len(u) or len(a) == 0:
        raise ValueError(
            f"a and u must be [N, d_in] and [N, d_out] with N >= 1, got {tuple(a.shape)}, {tuple(u.shape)}"
        )
    if not (a.is_floating_point() and a.dtype == u.dtype):
        raise TypeError(f"a and u must share a floating-point dtype, got {a.dtype} and {u.dtype}")
    return len(a)
