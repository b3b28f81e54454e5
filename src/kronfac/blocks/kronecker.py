"""Kronecker product of an output and an input factor: the block of KFAC and KFC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from kronfac.blocks.base import Block, Inverse
from kronfac.blocks.checks import check_factor, check_pair, check_square, check_tensors, check_vector
from kronfac.blocks.eigen_inverse import EigenInverse
from kronfac.blocks.eigenbasis import Eigenbasis
from kronfac.blocks.inverses import KroneckerInverse
from kronfac.blocks.shifts import PerFactor, Shift, Uniform
from kronfac.linalg.factorise import eighs
from kronfac.linalg.inverse import invert
from kronfac.linalg.products import matmul

_NAMES = ("the input factor", "the output factor")


class Kronecker(Block):
    """``C = G x A`` for each stack element: ``C vec(V) = vec(G V A)`` with row-major ``vec``.

    Attributes:
        input: ``A``, symmetric positive semi-definite, shape ``[*stack, d_in, d_in]``.
        output: ``G``, symmetric positive semi-definite, shape ``[*stack, d_out, d_out]``.
    """

    kind = "kronecker"
    shifts = (PerFactor, Uniform)

    def __init__(self, input: Tensor, output: Tensor) -> None:
        """Store the factors; they are not copied.

        Args:
            input: ``A``, shape ``[*stack, d_in, d_in]``, float32 or float64. Symmetry is taken on trust.
            output: ``G``, shape ``[*stack, d_out, d_out]``, of the same dtype and device.

        Raises:
            ValueError: If the shapes do not fit.
        """  # noqa: DOC502
        self.shape = product_shape(input, output)
        self.input = input
        self.output = output

    def tensors(self) -> dict[str, Tensor]:
        """Both factors.

        Returns:
            ``{"input": A, "output": G}``.
        """
        return {"input": self.input, "output": self.output}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: torch.Size) -> Self:
        """Rebuild a block from what `tensors` gave.

        Args:
            tensors: ``{"input": A, "output": G}``.
            shape: The block's shape.

        Returns:
            The block.
        """
        check_tensors(cls.kind, tensors, ("input", "output"), shape, None)
        block = cls(tensors["input"], tensors["output"])
        check_tensors(cls.kind, tensors, ("input", "output"), shape, block.shape)
        return block

    def matmul(self, vector: Tensor) -> Tensor:
        """Multiply by a vector: ``G V A``.

        Args:
            vector: ``V``, shape ``[..., *stack, d_out, d_in]``.

        Returns:
            The product in the shape of ``vector``.
        """
        check_vector(vector, self.shape, self.dtype)
        return matmul(matmul(self.output, vector), self.input)

    def trace(self) -> Tensor:
        """Trace ``tr(A) tr(G)``, summed over the stack.

        Returns:
            A 0-dim tensor.
        """
        return (_trace(self.input) * _trace(self.output)).sum()

    def diagonal(self) -> Tensor:
        """Diagonal: outer product of the factors' diagonals.

        Returns:
            The diagonal in the block's shape.
        """
        return diagonal(self.output).unsqueeze(-1) * diagonal(self.input).unsqueeze(-2)

    def frobenius_norm(self) -> Tensor:
        """Frobenius norm, from those of the factors.

        Returns:
            A 0-dim tensor.
        """
        norms = torch.linalg.matrix_norm(self.input) * torch.linalg.matrix_norm(self.output)
        return torch.linalg.vector_norm(norms)

    def _structured_inner(self, other: Block) -> Tensor | None:
        if not isinstance(other, Kronecker):
            return None
        inputs = (self.input * other.input).sum((-2, -1))
        outputs = (self.output * other.output).sum((-2, -1))
        return (inputs * outputs).sum()

    def sums(self) -> dict[str, tuple[Tensor, float]]:
        """What a factorisation reads.

        Returns:
            By factor a matrix and a number: the upper triangle of their product is that of the factor.
        """
        return {"input": (self.input, 1.0), "output": (self.output, 1.0)}

    def factor_means(self) -> tuple[Tensor, Tensor]:
        """Mean eigenvalues of the two factors.

        Returns:
            ``(tr A / d_in, tr G / d_out)``, each of shape ``[*stack]``.
        """
        return _trace(self.input) / self.shape[-1], _trace(self.output) / self.shape[-2]

    def matrices(self) -> Tensor:
        """One dense matrix for each stack element.

        Returns:
            Shape ``[*stack, n, n]`` with ``n = d_out * d_in``.
        """
        n = self.shape[-2] * self.shape[-1]
        product = torch.einsum("...ij,...kl->...ikjl", self.output, self.input)
        return product.reshape(*self.shape[:-2], n, n)

    def eigh(self) -> Eigenbasis:
        """Eigendecomposition: products of the factors' eigenvalues.

        Returns:
            The eigenvalues, in the block's shape, with the maps into and out of the eigenbasis.
        """
        input, output = eighs([self.input, self.output], _NAMES)
        values = output.values.unsqueeze(-1) * input.values.unsqueeze(-2)
        return Eigenbasis(values, output=output.vectors, input=input.vectors)

    def factorise(self, shift: Shift) -> Inverse:
        """Prepare to solve with the block after a shift is added.

        ``PerFactor`` inverts the damped factors by Cholesky; ``Uniform`` is exact, through eigenvectors, and several
        times dearer.

        Args:
            shift: `PerFactor` or `Uniform`.

        Returns:
            A `KroneckerInverse` or an `EigenInverse`.
        """
        match shift:
            case PerFactor():
                input, output = invert([self.input, self.output], [shift.input, shift.output], _NAMES)
                logdet = (self.shape[-2] * input.logdet + self.shape[-1] * output.logdet).sum()
                return KroneckerInverse(input.inverse, output.inverse, logdet)
            case Uniform():
                return EigenInverse(self.eigh(), shift.value)
            case _:
                self._refuse(shift)

    def scale(self, factor: Tensor | float) -> Self:
        """Multiply by a number, which goes into the output factor.

        Args:
            factor: Not negative.

        Returns:
            A new block.
        """
        check_factor(factor)
        return type(self)(self.input, self.output * factor)


def product_shape(input: Tensor, output: Tensor) -> torch.Size:
    """Check two factors.

    Args:
        input: Shape ``[*stack, d_in, d_in]``, float32 or float64.
        output: Shape ``[*stack, d_out, d_out]``, of the same dtype and device.

    Returns:
        ``[*stack, d_out, d_in]``.

    Raises:
        ValueError: If the shapes do not fit.
    """
    check_square("input", input)
    check_square("output", output)
    check_pair(("input", "output"), input, output)
    if input.shape[:-2] != output.shape[:-2]:
        raise ValueError(f"input {tuple(input.shape)} and output {tuple(output.shape)} have different stacks")
    return torch.Size([*output.shape[:-1], input.shape[-1]])


def diagonal(matrix: Tensor) -> Tensor:
    """Diagonal of each matrix of a stack.

    Args:
        matrix: Shape ``[*stack, n, n]``.

    Returns:
        Shape ``[*stack, n]``, not a copy.
    """
    return matrix.diagonal(dim1=-2, dim2=-1)


def _trace(matrix: Tensor) -> Tensor:
    return diagonal(matrix).sum(-1)
