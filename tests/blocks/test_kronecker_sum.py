"""The sum of two Kronecker products against its dense twin, and its inner products with other blocks."""

from __future__ import annotations

import pytest
import torch
from tests.blocks.block_cases import BlockCase, close, random_psd, random_tensor
from torch import Tensor

from kronfac.blocks import (
    Block,
    Dense,
    DenseInverse,
    Diagonal,
    DiagonalKronecker,
    Kronecker,
    KroneckerSum,
    PerFactor,
    ScaledKronecker,
    Shift,
    TwoTermInverse,
    Uniform,
)
from kronfac.damping import RULES


class TestKroneckerSum(BlockCase):
    rank: int | None = None  # of the second term

    def factors(self) -> list[Tensor]:
        widths = (self.d_in, self.d_out, self.d_in, self.d_out)
        ranks = (None, None, self.rank, self.rank)
        return [
            random_psd(*self.stack, width, width, seed=seed, rank=rank)
            for seed, (width, rank) in enumerate(zip(widths, ranks, strict=True), 1)
        ]

    def block(self) -> KroneckerSum:
        return KroneckerSum(*self.factors())

    def damped(self, input: Tensor | float, output: Tensor | float) -> Tensor:
        """``(G + output I) x (A + input I) + G' x A'``, element by element of the stack."""
        ones = torch.ones(self.stack, dtype=torch.float64)
        flat = [factor.reshape(-1, *factor.shape[-2:]) for factor in self.factors()]
        extra = [(ones * shift).reshape(-1) for shift in (input, output)]
        parts = []
        for i in range(len(flat[0])):
            a = flat[0][i] + extra[0][i] * torch.eye(self.d_in, dtype=torch.float64)
            g = flat[1][i] + extra[1][i] * torch.eye(self.d_out, dtype=torch.float64)
            parts.append(torch.kron(g, a) + torch.kron(flat[3][i], flat[2][i]))
        return torch.block_diag(*parts)

    def dense(self) -> Tensor:
        return self.damped(0.0, 0.0)

    def shifted(self) -> list[tuple[Shift, Tensor]]:
        per_element = random_tensor(*self.stack, seed=5).abs() + 0.1
        return [
            *super().shifted(),
            (PerFactor(0.2, 0.7), self.damped(0.2, 0.7)),
            (PerFactor(per_element, 2 * per_element), self.damped(per_element, 2 * per_element)),
        ]

    def test_kinds_of_inverses(self) -> None:
        assert isinstance(self.block().factorise(PerFactor(0.1, 0.1)), TwoTermInverse)
        assert isinstance(self.block().factorise(Uniform(0.1)), DenseInverse)

    def test_the_factored_rule_splits_by_the_first_term(self) -> None:
        a, g = self.factors()[:2]
        shift = RULES["factored"](self.block(), 0.25)
        assert isinstance(shift, PerFactor)
        ratio = (a.diagonal(dim1=-2, dim2=-1).mean(-1) / g.diagonal(dim1=-2, dim2=-1).mean(-1)).sqrt()
        close(torch.as_tensor(shift.input), 0.5 * ratio)
        close(torch.as_tensor(shift.output), 0.5 / ratio)

    def test_inner_products_with_other_blocks(self) -> None:
        a, g = (random_psd(*self.stack, n, n, seed=20 + n) for n in (self.d_in, self.d_out))
        n = self.d_in * self.d_out
        others: list[Block] = [
            Kronecker(a, g),
            DiagonalKronecker(a.diagonal(dim1=-2, dim2=-1), g),
            ScaledKronecker.from_moments(a, g),
            Diagonal(random_tensor(*self.shape, seed=8).abs()),
            Dense(random_psd(*self.stack, n, n, seed=9), self.shape),
            KroneckerSum(a, g, 2 * a, g + 1),
        ]
        for other in others:
            expected = (self.dense() * other.to_dense()).sum()
            close(self.block().inner(other), expected)
            close(other.inner(self.block()), expected)

    def test_factors_that_do_not_fit_are_refused(self) -> None:
        tensors = self.block().tensors()
        with pytest.raises(ValueError, match="stack"):
            KroneckerSum(**tensors | {"input": tensors["input"][None]})
        with pytest.raises(TypeError, match="must agree"):
            KroneckerSum(**tensors | {"second_input": tensors["second_input"].float()})
        with pytest.raises(TypeError, match="must agree"):
            KroneckerSum(**tensors | {name: tensors[name].float() for name in ("second_input", "second_output")})
        with pytest.raises(ValueError, match="different shapes"):
            KroneckerSum(**tensors | {"second_output": tensors["second_output"][..., :-1, :-1]})


class TestKroneckerSumStack(TestKroneckerSum):
    stack = (3,)


class TestKroneckerSumOfLowRank(TestKroneckerSum):
    """As the means of one batch have it."""

    rank = 1


def test_a_singular_first_term_is_inverted_if_the_factor_damping_makes_it_positive() -> None:
    """The bias's row of a covariance is zero."""
    a, g, a2, g2 = (
        random_psd(4, 4, seed=1),
        random_psd(3, 3, seed=2),
        random_psd(4, 4, seed=3, rank=1),
        random_psd(3, 3, seed=4),
    )
    a[-1], a[:, -1] = 0.0, 0.0
    inverse = KroneckerSum(a, g, a2, g2).factorise(PerFactor(1e-6, 1e-6))
    eye_in, eye_out = torch.eye(4, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    dense = torch.kron(g + 1e-6 * eye_out, a + 1e-6 * eye_in) + torch.kron(g2, a2)
    vector = random_tensor(3, 4, seed=5)
    expected = torch.linalg.solve(dense, vector.flatten()).view(3, 4)
    torch.testing.assert_close(inverse.apply(vector), expected, rtol=1e-6, atol=1e-9)


def test_too_wide_for_a_dense_inverse_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    block = TestKroneckerSum().block()
    monkeypatch.setattr("kronfac.blocks.kronecker_sum.DENSE_LIMIT", 11)
    with pytest.raises(ValueError, match=r"3 x 4 = 12 exceeds the limit of 11.*rule='factored'"):
        block.factorise(Uniform(1.0))
    with pytest.raises(ValueError, match="no eigenvectors in closed form"):
        block.eigh()
    assert block.factorise(PerFactor(1.0, 1.0)).shape == block.shape


def test_float32_damps_in_float64() -> None:
    """In which the sum is inverted anyway; float32 rounds small shifts away beside large factors."""
    basis = [torch.linalg.qr(random_tensor(n, n, seed=n)).Q for n in (8, 6)]
    factors = [(q * torch.logspace(0, -9, len(q), dtype=torch.float64) @ q.mT).float() for q in basis]
    block = KroneckerSum(*((factor + factor.mT) / 2 for factor in factors * 2))
    found, wanted = (each.factorise(PerFactor(1e-7, 1e-7)) for each in (block, block.to(dtype=torch.float64)))
    assert found.logdet().dtype == torch.float32
    torch.testing.assert_close(found.logdet().double(), wanted.logdet(), rtol=1e-5, atol=0)
    vector = random_tensor(6, 8, seed=3)
    expected = wanted.apply(vector)
    assert torch.linalg.norm(found.apply(vector.float()) - expected) < 1e-4 * torch.linalg.norm(expected)


def test_terms_that_are_singular_together_are_refused() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    for seed in range(20):
        a = random_psd(5, 5, seed=seed, rank=4)
        with pytest.raises(torch.linalg.LinAlgError, match=r"input side of the sum of two .* singular to rounding"):
            KroneckerSum(a, eye, 2 * a, 3 * eye).factorise(PerFactor(0.0, 0.0))
