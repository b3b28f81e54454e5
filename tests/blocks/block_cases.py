"""One test case that every block inherits: it must agree with its dense twin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kronfac.blocks import KINDS, Block, PerFactor, Shift, Uniform
from kronfac.linalg.inverse import invert

TOLERANCE = 1e-10


def random_psd(*shape: int, seed: int, rank: int | None = None) -> Tensor:
    """Symmetric positive semi-definite float64 matrices, shape [*stack, n, n]."""
    generator = torch.Generator().manual_seed(seed)
    n = shape[-1]
    rows = torch.randn(*shape[:-1], rank or n + 2, generator=generator, dtype=torch.float64)
    return rows @ rows.mT / n


def random_tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def cholesky_inverses(
    matrices: Sequence[Tensor], shifts: Sequence[Tensor | float], names: Sequence[str] | None = None
) -> list[Tensor]:
    """The inverses alone."""
    return [result.inverse for result in invert(matrices, shifts, names)]


class BlockCase:
    """Subclasses give a block, its dense twin computed in another way, and the dense twin of each shift."""

    stack: tuple[int, ...] = ()
    d_out = 3
    d_in = 4

    def block(self) -> Block:
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The same matrix, [P, P], by plain loops."""
        raise NotImplementedError

    def shifted(self) -> list[tuple[Shift, Tensor]]:
        """Each supported shift with the dense damped matrix."""
        return [(Uniform(0.3), self.dense() + 0.3 * torch.eye(self.size, dtype=torch.float64))]

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.stack, self.d_out, self.d_in])

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def vector(self, *batch: int, seed: int = 9) -> Tensor:
        return random_tensor(*batch, *self.shape, seed=seed)

    def test_shape_and_dtype(self) -> None:
        block = self.block()
        assert block.shape == self.shape
        assert block.dtype == torch.float64
        assert block.device.type == "cpu"
        assert str(tuple(self.shape)) in repr(block)

    def test_to_dense(self) -> None:
        close(self.block().to_dense(), self.dense())

    def test_matmul(self) -> None:
        vector = self.vector()
        close(self.block().matmul(vector), (self.dense() @ vector.flatten()).view(self.shape))

    def test_matmul_of_a_batch(self) -> None:
        vectors = self.vector(2, 5)
        expected = (vectors.reshape(10, -1) @ self.dense()).view(vectors.shape)
        close(self.block().matmul(vectors), expected)

    def test_quadratic_form(self) -> None:
        vectors = self.vector(5)
        flat = vectors.flatten(1)
        expected = (flat @ self.dense() * flat).sum(1)
        close(self.block().quadratic_form(vectors), expected)
        assert self.block().quadratic_form(vectors[0]).shape == ()
        close(self.block().quadratic_form(vectors[0]), expected[0])

    def test_trace(self) -> None:
        close(self.block().trace(), self.dense().trace())

    def test_diagonal(self) -> None:
        close(self.block().diagonal(), self.dense().diagonal().view(self.shape))

    def test_frobenius_norm(self) -> None:
        close(self.block().frobenius_norm(), torch.linalg.matrix_norm(self.dense()))

    def test_inner_with_itself(self) -> None:
        close(self.block().inner(self.block()), self.dense().square().sum())

    def test_spectrum(self) -> None:
        close(self.block().eigh().spectrum(), torch.linalg.eigvalsh(self.dense()).clamp_min(0))

    def test_eigenbasis_rebuilds_the_block(self) -> None:
        basis = self.block().eigh()
        vector = self.vector()
        assert basis.values.shape == self.shape
        close(basis.from_basis(basis.values * basis.to_basis(vector)), self.block().matmul(vector))
        close(basis.from_basis(basis.to_basis(vector)), vector)

    def test_autocast_leaves_solutions_alone(self) -> None:
        """In float32, of which it would make 16 bits; a step may be taken within it."""
        block, vector = self.block().to(dtype=torch.float32), self.vector().float()
        for shift, _ in self.shifted():
            inverse = block.factorise(shift)
            with torch.autocast("cpu", torch.bfloat16):
                found = inverse.apply(vector), inverse.sqrt_apply(vector)
            assert torch.equal(found[0], inverse.apply(vector))
            assert torch.equal(found[1], inverse.sqrt_apply(vector))

    def test_factorise_apply(self) -> None:
        for shift, dense in self.shifted():
            vectors = self.vector(2)
            inverse = self.block().factorise(shift)
            assert inverse.shape == self.shape
            expected = torch.linalg.solve(dense, vectors.flatten(1).mT).mT.view(vectors.shape)
            close(inverse.apply(vectors), expected)
            close(inverse.apply(vectors[0]), expected[0])

    def test_factorise_sqrt_apply(self) -> None:
        for shift, dense in self.shifted():
            unit = torch.eye(self.size, dtype=torch.float64).view(-1, *self.shape)
            root = self.block().factorise(shift).sqrt_apply(unit).flatten(1).mT
            close(root @ root.mT, torch.linalg.inv(dense))

    def test_factorise_logdet(self) -> None:
        for shift, dense in self.shifted():
            logdet = self.block().factorise(shift).logdet()
            assert logdet.shape == ()
            close(logdet, torch.linalg.slogdet(dense).logabsdet)

    def test_factorise_shifts_are_the_advertised_ones(self) -> None:
        assert {type(shift) for shift, _ in self.shifted()} == set(self.block().shifts)

    def test_factorise_refuses_other_shifts_by_name(self) -> None:
        class Foreign(Shift):
            pass

        others = [shift for shift in (PerFactor(1.0, 1.0), Foreign()) if type(shift) not in self.block().shifts]
        for shift in others:
            with pytest.raises(TypeError, match=rf"{type(self.block()).__name__}.*{type(shift).__name__}.*accepts \w+"):
                self.block().factorise(shift)

    def test_scale(self) -> None:
        close(self.block().scale(2.5).to_dense(), 2.5 * self.dense())
        close(self.block().scale(torch.tensor(0.5, dtype=torch.float64)).to_dense(), 0.5 * self.dense())
        for wrong in (-1.0, math.nan, math.inf, torch.ones(2)):
            with pytest.raises(ValueError, match="scaled by"):
                self.block().scale(wrong)

    def test_tensors_round_trip(self) -> None:
        block = self.block()
        again = KINDS[block.kind].from_tensors(block.tensors(), block.shape)
        assert type(again) is type(block)
        assert torch.equal(again.to_dense(), block.to_dense())
        with pytest.raises(ValueError, match="made of the tensors"):
            type(block).from_tensors({"foreign": torch.ones(1)}, block.shape)
        with pytest.raises(ValueError, match="shape"):
            type(block).from_tensors(block.tensors(), torch.Size([*self.stack, self.d_out, self.d_in + 1]))

    def test_to_converts_and_shares_what_needs_no_conversion(self) -> None:
        block = self.block()
        single = block.to(dtype=torch.float32)
        assert single.dtype == torch.float32
        assert single.matmul(self.vector().float()).dtype == torch.float32
        for name, tensor in block.to(dtype=torch.float64).tensors().items():
            assert tensor.data_ptr() == block.tensors()[name].data_ptr()

    def test_half_precision_is_refused(self) -> None:
        for dtype in (torch.float16, torch.bfloat16):
            with pytest.raises(TypeError, match="float32 or float64"):
                self.block().to(dtype=dtype)

    def test_vectors_that_do_not_fit_are_refused(self) -> None:
        for act in (self.block().matmul, self.block().factorise(Uniform(1.0)).apply):
            with pytest.raises(ValueError, match="acts on vectors of shape"):
                act(self.vector()[..., :-1])
            with pytest.raises(TypeError, match=r"float64 and the vector torch.float32"):
                act(self.vector().float())

    def test_nan_and_inf_are_refused_when_factorised(self) -> None:
        for value in (math.nan, math.inf):
            for name in self.block().tensors():
                tensors = {key: tensor.clone() for key, tensor in self.block().tensors().items()}
                matrix = tensors[name].ndim == len(self.stack) + 2 and self.block().kind != "diagonal"
                # The last entry of the first row and its mirror image: off the diagonal where there is one.
                if matrix:
                    tensors[name][..., 0, -1] = tensors[name][..., -1, 0] = value
                elif tensors[name].ndim == len(self.stack):
                    tensors[name].fill_(value)
                else:
                    tensors[name][..., 0] = value
                broken = type(self.block()).from_tensors(tensors, self.shape)
                for shift, _ in self.shifted():
                    with pytest.raises(torch.linalg.LinAlgError, match=r"NaN or Inf|finite"):
                        broken.factorise(shift)

    def test_singular_without_damping_is_refused(self) -> None:
        block = self.block().scale(0.0)
        for shift, _ in self.shifted():
            zero = PerFactor(0.0, 0.0) if isinstance(shift, PerFactor) else Uniform(0.0)
            with pytest.raises(torch.linalg.LinAlgError, match="larger damping"):
                block.factorise(zero)


class FactoredCase(BlockCase):
    """Adds the per-factor shift for Kronecker products."""

    def input_matrices(self) -> Tensor:
        raise NotImplementedError

    def output_matrices(self) -> Tensor:
        return random_psd(*self.stack, self.d_out, self.d_out, seed=2)

    def kronecker(self, extra_input: Tensor, extra_output: Tensor) -> Tensor:
        """Dense Kronecker product, with shifts of the stack's shape added to the factors."""
        parts = []
        for index in torch.cartesian_prod(*map(torch.arange, (*self.stack, 1))).reshape(-1, len(self.stack) + 1):
            i = tuple(index[:-1].tolist())
            a = self.input_matrices()[i] + extra_input[i] * torch.eye(self.d_in, dtype=torch.float64)
            g = self.output_matrices()[i] + extra_output[i] * torch.eye(self.d_out, dtype=torch.float64)
            parts.append(torch.kron(g, a))
        return torch.block_diag(*parts)

    def dense(self) -> Tensor:
        zero = torch.zeros(self.stack, dtype=torch.float64)
        return self.kronecker(zero, zero)

    def shifted(self) -> list[tuple[Shift, Tensor]]:
        ones = torch.ones(self.stack, dtype=torch.float64)
        per_element = random_tensor(*self.stack, seed=5).abs() + 0.1
        return [
            *super().shifted(),
            (PerFactor(0.2, 0.7), self.kronecker(0.2 * ones, 0.7 * ones)),
            (PerFactor(per_element, 2 * per_element), self.kronecker(per_element, 2 * per_element)),
        ]

    def test_factor_means(self) -> None:
        means = self.block().factor_means()
        assert means is not None
        close(means[0], self.input_matrices().diagonal(dim1=-2, dim2=-1).mean(-1))
        close(means[1], self.output_matrices().diagonal(dim1=-2, dim2=-1).mean(-1))

    def test_factors_that_do_not_fit_are_refused(self) -> None:
        block = self.block()
        tensors = block.tensors()
        make = type(block)
        with pytest.raises(ValueError, match="stack"):
            make(**tensors | {"input": tensors["input"][None]})
        with pytest.raises(TypeError, match="must agree"):
            make(**tensors | {"input": tensors["input"].float()})
        with pytest.raises(ValueError, match="shape"):
            make(**tensors | {"output": tensors["output"][..., :-1]})
        with pytest.raises(TypeError, match="must be a tensor"):
            make(**tensors | {"input": 1.0})
