"""Sums and differences of two Kronecker products, against their dense twins."""

from __future__ import annotations

import pytest
import torch
from tests.blocks.block_cases import random_psd, random_tensor
from torch import Tensor

from kronfac.blocks import INVERSES, TwoTermInverse
from kronfac.linalg.kronecker_sum import diagonalise_sum

D_OUT, D_IN = 4, 5


def pair(*stack: int, seed: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """``(A, G)``."""
    return (
        random_psd(*stack, D_IN, D_IN, seed=seed, rank=rank),
        random_psd(*stack, D_OUT, D_OUT, seed=seed + 1, rank=rank),
    )


def dense(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], sign: int) -> Tensor:
    """The matrix over the row-major ``vec(V)``, one per stack element."""
    shape = (-1, D_OUT * D_IN, D_OUT * D_IN)
    products = [torch.einsum("...op,...ij->...oipj", g, a).reshape(shape) for a, g in (first, second)]
    return products[0] + sign * products[1]


def case(sign: int, stack: tuple[int, ...]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Factors of a well-conditioned sum, or of a difference of which enough is left."""
    first, second = pair(*stack, seed=1), pair(*stack, seed=11)
    first = (first[0] + torch.eye(D_IN, dtype=torch.float64), first[1] + torch.eye(D_OUT, dtype=torch.float64))
    if sign == -1:
        norms = [torch.linalg.matrix_norm(s, 2)[..., None, None] for s in second]
        second = (0.9 * second[0] / norms[0], 0.9 * second[1] / norms[1])  # below the identity, hence below first
    return first, second, dense(first, second, sign)


@pytest.mark.parametrize("stack", [(), (3,), (2, 2)])
@pytest.mark.parametrize("sign", [1, -1])
def test_solve_root_and_logdet_are_those_of_the_dense_matrix(sign: int, stack: tuple[int, ...]) -> None:
    first, second, matrix = case(sign, stack)
    inverse = TwoTermInverse.of(first, second, sign)
    assert inverse.shape == (*stack, D_OUT, D_IN)
    vector = random_tensor(2, *stack, D_OUT, D_IN, seed=5)
    flat = vector.reshape(2, -1, D_OUT * D_IN, 1)
    wanted = torch.linalg.solve(matrix, flat).reshape(vector.shape)
    assert float((inverse.apply(vector) - wanted).norm() / wanted.norm()) < 1e-12
    torch.testing.assert_close(inverse.logdet(), torch.linalg.slogdet(matrix).logabsdet.sum(), rtol=1e-12, atol=1e-12)
    units = torch.eye(D_OUT * D_IN, dtype=torch.float64).reshape(-1, *(1 for _ in stack), D_OUT, D_IN)
    root = inverse.sqrt_apply(units.expand(-1, *stack, -1, -1).contiguous()).reshape(D_OUT * D_IN, -1, D_OUT * D_IN)
    product = torch.einsum("ksp,ksq->spq", root, root)
    assert float((product - torch.linalg.inv(matrix)).norm() / product.norm()) < 1e-12


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_badly_scaled_terms_are_balanced(scale: float) -> None:
    first, second, matrix = case(1, ())
    inverse = TwoTermInverse.of((first[0] * scale, first[1] / scale), (second[0] / scale, second[1] * scale))
    vector = random_tensor(D_OUT, D_IN, seed=5)
    wanted = torch.linalg.solve(matrix[0], vector.flatten()).reshape(vector.shape)
    assert float((inverse.apply(vector) - wanted).norm() / wanted.norm()) < 1e-10


def test_single_factors_of_a_sum_may_be_singular() -> None:
    """As those of XK-FAC are: a covariance of inputs with a constant, and the square of their mean."""
    first, second = pair(seed=1), pair(seed=11)
    first[0][-1], first[0][:, -1] = 0, 0
    second = (torch.ones(D_IN, D_IN, dtype=torch.float64), second[1])
    matrix = dense(first, second, 1)[0]
    assert float(torch.linalg.eigvalsh(first[0])[0]) < 1e-12
    vector = random_tensor(D_OUT, D_IN, seed=5)
    wanted = torch.linalg.solve(matrix, vector.flatten()).reshape(vector.shape)
    found = TwoTermInverse.of(first, second).apply(vector)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-10


def test_a_zero_second_term_is_the_kronecker_inverse() -> None:
    first = case(1, ())[0]
    zero = (torch.zeros_like(first[0]), torch.zeros_like(first[1]))
    wanted = torch.linalg.inv(torch.kron(first[1], first[0]))
    for sign in (1, -1):
        units = torch.eye(D_OUT * D_IN, dtype=torch.float64).reshape(-1, D_OUT, D_IN)
        found = TwoTermInverse.of(first, zero, sign).apply(units).flatten(1)
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_float32_factors_are_solved_in_float64() -> None:
    """A difference of which one part in a hundred thousand is left: float32 alone would see noise."""
    eye_in, eye_out = torch.eye(D_IN), torch.eye(D_OUT)
    found = TwoTermInverse.of((eye_in, eye_out), (eye_in * (1 - 1e-5), eye_out), -1)
    vector = random_tensor(D_OUT, D_IN, seed=5).float()
    left = 1 - (torch.tensor(1.0) * (1 - 1e-5)).double()
    assert found.apply(vector).dtype == torch.float32
    torch.testing.assert_close(found.apply(vector).double(), vector.double() / left, rtol=1e-5, atol=0)


def test_what_is_not_positive_definite_is_refused() -> None:
    first, second, _ = case(-1, (2,))
    large = (second[0].clone(), second[1])
    large[0][1] *= 1e3
    with pytest.raises(torch.linalg.LinAlgError, match=r"the test, stack element \[1\], \(20 x 20\) is not positive"):
        diagonalise_sum(first, large, -1, "the test")
    singular = (torch.zeros(D_IN, D_IN, dtype=torch.float64), torch.eye(D_OUT, dtype=torch.float64))
    with pytest.raises(torch.linalg.LinAlgError, match=r"the input side of the sum .*not positive definite"):
        diagonalise_sum(singular, singular)
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        diagonalise_sum(pair(seed=1, rank=1), pair(seed=3, rank=1))
    equal = case(1, ())[0]
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        diagonalise_sum(equal, equal, -1)


def test_bad_arguments() -> None:
    first, second, _ = case(1, ())
    with pytest.raises(ValueError, match="sign must be 1 or -1, got 0"):
        diagonalise_sum(first, second, 0)
    with pytest.raises(ValueError, match="the two output factors must agree"):
        diagonalise_sum(first, (second[0], second[0]))
    with pytest.raises(ValueError, match="do not fit"):
        TwoTermInverse(first[0], first[1], first[0], torch.zeros(()))


def test_the_inverse_is_rebuilt_from_its_tensors() -> None:
    first, second, _ = case(1, (3,))
    inverse = TwoTermInverse.of(first, second)
    again = INVERSES["two_term"].from_tensors(inverse.tensors(), inverse.shape)
    vector = random_tensor(3, D_OUT, D_IN, seed=5)
    assert torch.equal(again.apply(vector), inverse.apply(vector))
    assert torch.equal(again.logdet(), inverse.logdet())
