"""Every block against its dense twin, with and without stack dimensions."""

from __future__ import annotations

import pytest
import torch
from tests.blocks.block_cases import BlockCase, FactoredCase, close, random_psd, random_tensor
from torch import Tensor

from kronfac.blocks import (
    KINDS,
    Block,
    Dense,
    Diagonal,
    DiagonalKronecker,
    EigenKronecker,
    Kronecker,
    KroneckerInverse,
    KroneckerSums,
    PerFactor,
    Rescaled,
    ScaledKronecker,
    Shift,
    Uniform,
)
from kronfac.damping import factored
from kronfac.linalg.inverse import invert


class TestKronecker(FactoredCase):
    def input_matrices(self) -> Tensor:
        return random_psd(*self.stack, self.d_in, self.d_in, seed=1)

    def block(self) -> Block:
        return Kronecker(self.input_matrices(), self.output_matrices())

    def test_inverse_is_explicit_and_symmetric(self) -> None:
        inverse = self.block().factorise(PerFactor(0.2, 0.7))
        assert isinstance(inverse, KroneckerInverse)
        eye = torch.eye(self.d_in, dtype=torch.float64)
        close(inverse.input, torch.linalg.inv(self.input_matrices() + 0.2 * eye))
        assert torch.equal(inverse.input, inverse.input.mT)
        assert torch.equal(inverse.output, inverse.output.mT)

    def test_logdet_from_the_inverses_alone(self) -> None:
        inverse = self.block().factorise(PerFactor(0.2, 0.7))
        assert isinstance(inverse, KroneckerInverse)
        close(KroneckerInverse(inverse.input, inverse.output).logdet(), inverse.logdet())

    def test_factorise_leaves_the_factors_alone(self) -> None:
        block = self.block()
        block.factorise(PerFactor(0.2, 0.7))
        block.factorise(Uniform(0.2))
        assert torch.equal(block.tensors()["input"], self.input_matrices())


class TestKroneckerStack(TestKronecker):
    stack = (3,)


class TestKroneckerSums(TestKronecker):
    """From upper triangles and scales; what lies below them is never read."""

    stack = (2,)

    def block(self) -> Block:
        sums = [self.input_matrices() / 0.25, self.output_matrices() / 3.0]
        for total in sums:
            total[torch.ones_like(total).tril(-1).bool()] = torch.nan
        return KroneckerSums(*sums, 0.25, 3.0)

    def test_tensors_round_trip(self) -> None:
        """What was saved holds its factors."""
        block = self.block()
        again = type(block).from_tensors(block.tensors(), block.shape)
        assert type(again) is KINDS[block.kind] is Kronecker
        close(again.to_dense(), TestKronecker.block(self).to_dense())

    @pytest.mark.parametrize("damping", [0.3, 0.0])
    def test_a_refresh_reads_what_it_would_of_the_factors(self, damping: float) -> None:
        shifts = [factored(block, damping) for block in (self.block(), TestKronecker.block(self))]
        close(torch.stack([shifts[0].input, shifts[0].output]), torch.stack([shifts[1].input, shifts[1].output]))
        sums = self.block().sums()
        for side, scale in (("input", 0.25), ("output", 3.0)):
            assert sums[side][1] == scale
            (found,) = invert([sums[side][0]], [0.3], scales=[scale])
            (wanted,) = invert([self.block().tensors()[side]], [0.3])
            close(found.inverse, wanted.inverse)


class TestKroneckerStackOfStacks(TestKronecker):
    stack = (2, 2)


class TestKroneckerNorm(TestKronecker):
    """The shape of a normalisation layer: a 2 x 2 block for each channel."""

    stack = (4,)
    d_out = 1
    d_in = 2


class TestDiagonalKronecker(FactoredCase):
    def counts(self) -> Tensor:
        return random_tensor(*self.stack, self.d_in, seed=3).abs()

    def input_matrices(self) -> Tensor:
        return torch.diag_embed(self.counts())

    def block(self) -> Block:
        return DiagonalKronecker(self.counts(), self.output_matrices())


class TestDiagonalKroneckerStack(TestDiagonalKronecker):
    stack = (2,)


class TestScaledKronecker(FactoredCase):
    """``FactoredCase`` describes the balanced factors; the block is given by those of unit trace."""

    diagonal_input = False

    def delta(self) -> Tensor:
        return random_tensor(*self.stack, seed=11).abs() + 0.5

    def unit(self, width: int, seed: int) -> Tensor:
        matrix = random_psd(*self.stack, width, width, seed=seed)
        matrix = torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1)) if self.diagonal_input and seed == 1 else matrix
        return matrix / matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]

    def input_matrices(self) -> Tensor:
        return self.delta().sqrt()[..., None, None] * self.unit(self.d_in, 1)

    def output_matrices(self) -> Tensor:
        return self.delta().sqrt()[..., None, None] * self.unit(self.d_out, 2)

    def block(self) -> Block:
        input = self.unit(self.d_in, 1)
        input = input.diagonal(dim1=-2, dim2=-1) if self.diagonal_input else input
        return ScaledKronecker(input.clone(), self.unit(self.d_out, 2), self.delta())

    def shifted(self) -> list[tuple[Shift, Tensor]]:
        scale, extra = 3 * self.delta(), self.delta() / 7
        grown = self.__class__.__new__(self.__class__)
        grown.delta = lambda: scale  # type: ignore[method-assign]
        return [*super().shifted(), (Rescaled(scale, extra, 2 * extra), grown.kronecker(extra, 2 * extra))]

    def test_the_trace_is_the_scale(self) -> None:
        close(self.block().trace(), self.delta().sum())

    def test_from_moments_normalises_and_leaves_them_alone(self) -> None:
        block = self.block()
        input, output = (self.delta()[..., None, None] * self.unit(n, s) for n, s in ((self.d_in, 1), (self.d_out, 2)))
        input = input.diagonal(dim1=-2, dim2=-1).clone() if self.diagonal_input else input
        before = input.clone()
        again = ScaledKronecker.from_moments(input, output)
        assert torch.equal(input, before)
        for name, tensor in block.tensors().items():
            close(again.tensors()[name], tensor)

    def test_without_signal_it_is_zero_and_can_still_be_rescaled(self) -> None:
        block = ScaledKronecker.from_moments(*(0 * t for t in list(self.block().tensors().values())[:2]))
        assert float(block.trace()) == 0
        ones = torch.ones(self.stack, dtype=torch.float64)
        solved = block.factorise(Rescaled(ones, ones / self.d_in, ones / self.d_out)).apply(self.vector())
        close(solved, self.vector() * self.d_in * self.d_out / 4)

    def test_a_scale_of_another_stack_is_refused(self) -> None:
        tensors = self.block().tensors()
        with pytest.raises(ValueError, match="delta must have the stack's shape"):
            ScaledKronecker(**tensors | {"delta": tensors["delta"][None]})


class TestScaledKroneckerStack(TestScaledKronecker):
    stack = (3,)


class TestScaledDiagonalKronecker(TestScaledKronecker):
    diagonal_input = True


class TestScaledDiagonalKroneckerStack(TestScaledDiagonalKronecker):
    stack = (2,)


class TestDiagonal(BlockCase):
    def values(self) -> Tensor:
        return random_tensor(*self.shape, seed=4).abs()

    def block(self) -> Block:
        return Diagonal(self.values())

    def dense(self) -> Tensor:
        return self.values().flatten().diag()

    def test_no_matrix_in_disguise(self) -> None:
        assert self.block().factor_means() is None
        with pytest.raises(ValueError, match=r"\[\*stack, d_out, d_in\]"):
            Diagonal(torch.ones(3))


class TestDiagonalStack(TestDiagonal):
    stack = (2,)


class TestDense(BlockCase):
    def matrix(self) -> Tensor:
        n = self.d_out * self.d_in
        return random_psd(*self.stack, n, n, seed=6)

    def block(self) -> Block:
        return Dense(self.matrix(), self.shape)

    def dense(self) -> Tensor:
        matrix = self.matrix()
        return torch.block_diag(*matrix.reshape(-1, *matrix.shape[-2:]))

    def test_shape_that_does_not_fit(self) -> None:
        assert self.block().factor_means() is None
        for shape in ((5, 5), (*self.stack, 12), (7, self.d_out, self.d_in)):
            with pytest.raises(ValueError, match="d_out"):
                Dense(self.matrix(), shape)


class TestDenseStack(TestDense):
    stack = (2, 1)


class TestEigenKronecker(BlockCase):
    identity_input = False

    def values(self) -> Tensor:
        return random_tensor(*self.shape, seed=7).abs()

    def basis(self, width: int, seed: int) -> Tensor:
        return torch.linalg.qr(random_tensor(*self.stack, width, width, seed=seed)).Q

    def bases(self) -> tuple[Tensor, Tensor]:
        eye = torch.eye(self.d_in, dtype=torch.float64).expand(*self.stack, -1, -1)
        return self.basis(self.d_out, 11), eye if self.identity_input else self.basis(self.d_in, 12)

    def block(self) -> Block:
        output, input = self.bases()
        return EigenKronecker(self.values(), output, None if self.identity_input else input)

    def dense(self) -> Tensor:
        """A sum of outer products of the eigenvectors, one by one."""
        output, input = (basis.reshape(-1, *basis.shape[-2:]) for basis in self.bases())
        parts = []
        for values, q_out, q_in in zip(self.values().reshape(-1, self.d_out, self.d_in), output, input, strict=True):
            matrix = torch.zeros(values.numel(), values.numel(), dtype=torch.float64)
            for o in range(self.d_out):
                for i in range(self.d_in):
                    vector = torch.outer(q_out[:, o], q_in[:, i]).flatten()
                    matrix += values[o, i] * torch.outer(vector, vector)
            parts.append(matrix)
        return torch.block_diag(*parts)

    def test_values_and_bases_that_do_not_fit_are_refused(self) -> None:
        assert self.block().factor_means() is None
        output, input = self.bases()
        with pytest.raises(ValueError, match=r"output of shape .* got"):
            EigenKronecker(self.values(), input, input)
        with pytest.raises(ValueError, match="stack"):
            EigenKronecker(self.values(), output, input[None])
        with pytest.raises(TypeError, match="must agree"):
            EigenKronecker(self.values(), output.float(), input)
        with pytest.raises(ValueError, match=r"\[\*stack, d_out, d_in\]"):
            EigenKronecker(torch.ones(3), output, input)

    def test_a_kronecker_product_is_the_case_of_rank_one(self) -> None:
        product = Kronecker(
            random_psd(*self.stack, self.d_in, self.d_in, seed=1),
            random_psd(*self.stack, self.d_out, self.d_out, seed=2),
        )
        basis = product.eigh()
        assert basis.output is not None
        close(EigenKronecker(basis.values, basis.output, basis.input).to_dense(), product.to_dense())


class TestEigenKroneckerStack(TestEigenKronecker):
    stack = (2,)


class TestEigenKroneckerIdentity(TestEigenKronecker):
    """The block of an embedding: the input basis is the identity."""

    identity_input = True


class TestEigenKroneckerIdentityStack(TestEigenKroneckerIdentity):
    stack = (2, 2)


CASES = (
    TestKronecker,
    TestDiagonalKronecker,
    TestDiagonal,
    TestDense,
    TestEigenKronecker,
    TestEigenKroneckerIdentity,
    TestScaledKronecker,
    TestScaledDiagonalKronecker,
)
STACKS = (
    TestKroneckerStack,
    TestDiagonalKroneckerStack,
    TestDiagonalStack,
    TestEigenKroneckerStack,
)


@pytest.mark.parametrize("left", CASES)
@pytest.mark.parametrize("right", CASES)
def test_inner_product_of_every_pair(left: type[BlockCase], right: type[BlockCase]) -> None:
    expected = (left().dense() * right().dense().mT).sum()
    close(left().block().inner(right().block()), expected)


@pytest.mark.parametrize("right", STACKS)
def test_inner_product_of_stacks(right: type[BlockCase]) -> None:
    class Left(TestKronecker):
        stack = right.stack

    close(Left().block().inner(right().block()), (Left().dense() * right().dense()).sum())


def test_inner_product_of_different_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match="no inner product"):
        TestKronecker().block().inner(TestKroneckerStack().block())


def test_uniform_damping_of_a_singular_product_is_exact() -> None:
    """Rank-one factors have eigenvalues that rounding makes negative; they count as zero."""
    a, g = random_psd(4, 4, seed=1, rank=1), random_psd(3, 3, seed=2, rank=1)
    inverse = Kronecker(a, g).factorise(Uniform(1e-3))
    vector = random_tensor(3, 4, seed=3)
    dense = torch.kron(g, a) + 1e-3 * torch.eye(12, dtype=torch.float64)
    expected = torch.linalg.solve(dense, vector.flatten()).view(3, 4)
    torch.testing.assert_close(inverse.apply(vector), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_shifts_are_validated(bad: float) -> None:
    with pytest.raises(ValueError, match="value"):
        Uniform(bad)
    with pytest.raises(ValueError, match="input"):
        PerFactor(bad, 1.0)
    with pytest.raises(ValueError, match="output"):
        PerFactor(1.0, torch.tensor([1.0, bad]))


@pytest.mark.parametrize("stack", [(), (2,)])
def test_scaling_by_a_float64_number_keeps_float32(stack: tuple[int, ...]) -> None:
    """Of two tensors without dimensions the wider dtype wins, which the scale of one product is."""
    block = ScaledKronecker.from_moments(random_psd(*stack, 3, 3, seed=1), random_psd(*stack, 2, 2, seed=2))
    scaled = block.to(dtype=torch.float32).scale(torch.tensor(0.3, dtype=torch.float64))
    assert scaled.dtype == scaled.delta.dtype == torch.float32
    torch.testing.assert_close(scaled.to_dense().double(), 0.3 * block.to_dense(), rtol=1e-5, atol=1e-6)
