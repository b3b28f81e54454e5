"""Sums and differences of two Kronecker products, solved exactly by simultaneous diagonalisation.

One congruence for each side makes both input factors and both output factors diagonal, so that
``G ⊗ A ± G' ⊗ A'`` becomes a diagonal matrix (Puiu 2022, supplement; Martens & Grosse 2015, appendix B, for the
difference). The paper's roots ``A^-1/2`` are replaced by Cholesky factors, which are cheaper and serve as well.

The work is done in float64 whatever the dtype of the factors: a difference cancels, and in float32 what is left of it
would be noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kronfac.linalg.factorise import cholesky, eigh, is_singular, refuse


class Diagonalised(NamedTuple):
    """``S = G ⊗ A ± G' ⊗ A'`` by one congruence: ``S^-1 = (K_G ⊗ K_A) diag(1 / values) (K_G ⊗ K_A)^T``.

    Attributes:
        input: ``K_A``, shape ``[*stack, d_in, d_in]``; not orthogonal.
        output: ``K_G``, shape ``[*stack, d_out, d_out]``.
        values: Positive, shape ``[*stack, d_out, d_in]``; no eigenvalues of ``S``.
        logdet: ``log det S``, shape ``[*stack]``.
    """

    input: Tensor
    output: Tensor
    values: Tensor
    logdet: Tensor


@torch.no_grad()
def diagonalise_sum(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], sign: int = 1, name: str = "the sum"
) -> Diagonalised:
    """Diagonalise ``G ⊗ A + sign · G' ⊗ A'`` by a congruence, in order to solve with it.

    All factors are symmetric positive semi-definite. For ``sign = 1`` single factors may be singular as long as the sum
    is positive definite; for ``sign = -1`` the first product must be positive definite itself, since it is not less
    than the difference.

    Args:
        first: ``(A, G)``, shapes ``[*stack, d_in, d_in]`` and ``[*stack, d_out, d_out]``, float32 or float64.
        second: ``(A', G')``, of the same shapes and dtype.
        sign: 1 or -1.
        name: What to call the matrix in an error.

    Returns:
        The congruence, in the factors' dtype.

    Raises:
        ValueError: If the sign is another, or shapes differ.

    A matrix that is not positive definite, as far as float64 can tell, raises a ``torch.linalg.LinAlgError``.
    """
    if sign not in (1, -1):
        raise ValueError(f"sign must be 1 or -1, got {sign!r}")
    for side, left, right in (("input", first[0], second[0]), ("output", first[1], second[1])):
        if left.shape != right.shape or left.dtype != right.dtype:
            raise ValueError(
                f"the two {side} factors must agree, got {tuple(left.shape)} of {left.dtype} and {tuple(right.shape)} "
                f"of {right.dtype}"
            )
    reduce = _relative_to_both if sign == 1 else _relative_to_first
    input, input_first, input_second, input_log = reduce(first[0], second[0], f"the input side of {name}")
    output, output_first, output_second, output_log = reduce(first[1], second[1], f"the output side of {name}")
    values = _outer(output_first, input_first) + sign * _outer(output_second, input_second)
    _require_positive(values, name)
    d_out, d_in = values.shape[-2:]
    logdet = d_out * input_log + d_in * output_log + values.log().sum((-2, -1))
    dtype = first[0].dtype
    return Diagonalised(input.to(dtype), output.to(dtype), values.to(dtype), logdet.to(dtype))


def _relative_to_first(first: Tensor, second: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``K`` with ``K^T first K = I`` and ``K^T second K`` diagonal; both diagonals, and ``log det first``."""
    vectors, values, logdet = _congruence(first.double(), second.double(), name)
    return vectors, torch.ones_like(values), values, logdet


def _relative_to_both(first: Tensor, second: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``K`` that makes both diagonal and ``first`` and ``second``, weighted alike, add up to the identity."""
    first, second = first.double(), second.double()
    traces = [matrix.diagonal(dim1=-2, dim2=-1).sum(-1) for matrix in (first, second)]
    usable = (traces[0] > 0) & (traces[1] > 0)
    weight = torch.where(usable, traces[0] / traces[1], torch.ones_like(traces[0]))
    vectors, values, logdet = _congruence(first + weight[..., None, None] * second, first, name)
    values = values.clamp(max=1.0)
    return vectors, values, (1 - values) / weight.unsqueeze(-1), logdet


def _congruence(metric: Tensor, other: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """``K`` with ``K^T metric K = I`` and ``K^T other K = diag(values)``, and ``log det metric``."""
    root = cholesky(metric, name)
    half = torch.linalg.solve_triangular(root, other, upper=False)
    white = torch.linalg.solve_triangular(root, half.mT, upper=False)
    values, vectors = eigh((white + white.mT) / 2, name)
    logdet = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    congruence = torch.linalg.solve_triangular(root.mT, vectors, upper=True)
    lost = is_singular(metric.diagonal(dim1=-2, dim2=-1), congruence.square().sum(-1))
    if bool(lost.any()):
        refuse(metric, ~lost, name)
    return congruence, values, logdet


def _outer(output: Tensor, input: Tensor) -> Tensor:
    return output.unsqueeze(-1) * input.unsqueeze(-2)


def _require_positive(values: Tensor, name: str) -> None:
    d_out, d_in = values.shape[-2:]
    smallest, largest = values.amin((-2, -1)), values.amax((-2, -1))
    good = smallest > (d_out + d_in) * torch.finfo(values.dtype).eps * largest.clamp_min(0)
    if bool(good.all()):
        return
    element = tuple(int(i) for i in (~good).nonzero()[0])
    where = f"{name}, stack element {list(element)}," if element else name
    raise torch.linalg.LinAlgError(
        f"{where} ({d_out * d_in} x {d_out * d_in}) is not positive definite: relative to its factors its smallest "
        f"value is {smallest[element].item():.3g}, its largest {largest[element].item():.3g}. Use a larger damping"
    )
