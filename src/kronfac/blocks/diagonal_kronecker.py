"""Kronecker product whose input factor is diagonal: the block of an embedding, whose input factor counts tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from kronfac.blocks.base import Block, Inverse
from kronfac.blocks.checks import check_factor, check_pair, check_precision, check_square, check_tensors, check_vector
from kronfac.blocks.eigen_inverse import EigenInverse
from kronfac.blocks.eigenbasis import Eigenbasis
from kronfac.blocks.inverses import DiagonalKroneckerInverse
from kronfac.blocks.kronecker import Kronecker
from kronfac.blocks.shifts import PerFactor, Shift, Uniform
from kronfac.linalg.factorise import eigh
from kronfac.linalg.inverse import invert


class DiagonalKronecker(Block):
    """``C = G x diag(a)`` for each stack element: column ``i`` of ``V`` goes to ``a_i G V[:, i]``.

    Attributes:
        input: ``a``, not negative, shape ``[*stack, d_in]``.
        output: ``G``, symmetric positive semi-definite, shape ``[*stack, d_out, d_out]``.
    """

    kind = "diagonal_kronecker"
    shifts = (PerFactor, Uniform)

    def __init__(self, input: Tensor, output: Tensor) -> None:
        """Store the factors; they are not copied.

        Args:
            input: ``a``, shape ``[*stack, d_in]``, float32 or float64.
            output: ``G``, shape ``[*stack, d_out, d_out]``, of the same dtype and device. Symmetry is taken on trust.

        Raises:
            ValueError: If the shapes do not fit.
        """
        check_precision("input", input)
        check_square("output", output)
        check_pair(("input", "output"), input, output)
        if input.ndim != output.ndim - 1 or input.shape[:-1] != output.shape[:-2]:
            raise ValueError(
                f"input must have shape [*stack, d_in] and output [*stack, d_out, d_out], "
                f"got {tuple(input.shape)} and {tuple(output.shape)}"
            )
        self.input = input
        self.output = output
        self.shape = torch.Size([*output.shape[:-1], input.shape[-1]])

    def tensors(self) -> dict[str, Tensor]:
        """Both factors.

        Returns:
            ``{"input": a, "output": G}``.
        """
        return {"input": self.input, "output": self.output}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: torch.Size) -> Self:
        """Rebuild a block from what `tensors` gave.

        Args:
            tensors: ``{"input": a, "output": G}``.
            shape: The block's shape.

        Returns:
            The block.
        """
        check_tensors(cls.kind, tensors, ("input", "output"), shape, None)
        block = cls(tensors["input"], tensors["output"])
        check_tensors(cls.kind, tensors, ("input", "output"), shape, block.shape)
        return block

    def matmul(self, vector: Tensor) -> Tensor:
        """Multiply by a vector: ``G V diag(a)``.

        Args:
            vector: ``V``, shape ``[..., *stack, d_out, d_in]``.

        Returns:
            The product in the shape of ``vector``.
        """
        check_vector(vector, self.shape, self.dtype)
        return self.output @ vector * self.input.unsqueeze(-2)

    def trace(self) -> Tensor:
        """Trace ``sum(a) tr(G)``, summed over the stack.

        Returns:
            A 0-dim tensor.
        """
        return (self.input.sum(-1) * self._output_diagonal().sum(-1)).sum()

    def diagonal(self) -> Tensor:
        """Diagonal: outer product of the diagonal of ``G`` and ``a``.

        Returns:
            The diagonal in the block's shape.
        """
        return self._output_diagonal().unsqueeze(-1) * self.input.unsqueeze(-2)

    def frobenius_norm(self) -> Tensor:
        """Frobenius norm, from those of the factors.

        Returns:
            A 0-dim tensor.
        """
        norms = torch.linalg.vector_norm(self.input, dim=-1) * torch.linalg.matrix_norm(self.output)
        return torch.linalg.vector_norm(norms)

    def _structured_inner(self, other: Block) -> Tensor | None:
        if isinstance(other, DiagonalKronecker):
            other_input = other.input
        elif isinstance(other, Kronecker):
            other_input = other.input.diagonal(dim1=-2, dim2=-1)
        else:
            return None
        return ((self.input * other_input).sum(-1) * (self.output * other.output).sum((-2, -1))).sum()

    def factor_means(self) -> tuple[Tensor, Tensor]:
        """Mean eigenvalues of the two factors.

        Returns:
            ``(sum(a) / d_in, tr G / d_out)``, each of shape ``[*stack]``.
        """
        return self.input.mean(-1), self._output_diagonal().mean(-1)

    def matrices(self) -> Tensor:
        """One dense matrix for each stack element.

        Returns:
            Shape ``[*stack, n, n]`` with ``n = d_out * d_in``.
        """
        return Kronecker(torch.diag_embed(self.input), self.output).matrices()

    def eigh(self) -> Eigenbasis:
        """Eigendecomposition, for which only ``G`` has to be decomposed.

        Returns:
            The eigenvalues, in the block's shape, with the maps into and out of the eigenbasis.
        """
        output = eigh(self.output, "the output factor")
        values = output.values.unsqueeze(-1) * self.input.clamp_min(0).unsqueeze(-2)
        return Eigenbasis(values, output=output.vectors)

    def factorise(self, shift: Shift) -> Inverse:
        """Prepare to solve with the block after a shift is added.

        Args:
            shift: `PerFactor`, or `Uniform`, which is exact and decomposes ``G`` into eigenvectors.

        Returns:
            A `DiagonalKroneckerInverse` or an `EigenInverse`.
        """
        match shift:
            case PerFactor():
                return self._factorise_factors(shift)
            case Uniform():
                return EigenInverse(self.eigh(), shift.value)
            case _:
                self._refuse(shift)

    def _factorise_factors(self, shift: PerFactor) -> DiagonalKroneckerInverse:
        extra = shift.input.to(self.input).unsqueeze(-1) if isinstance(shift.input, Tensor) else shift.input
        damped = self.input + extra
        reciprocals = damped.reciprocal()  # infinite where what is added is lost beside the smallest numbers there are
        if not bool(((damped > 0) & damped.isfinite() & reciprocals.isfinite()).all()):
            raise torch.linalg.LinAlgError(
                f"the input factor, a diagonal of size {self.shape[-1]}, has the entry {damped.min().item():.3g} "
                "with the damping added; it must be positive and finite. Use a larger damping"
            )
        (output,) = invert([self.output], [shift.output], ["the output factor"])
        logdet = (self.shape[-2] * damped.log().sum(-1) + self.shape[-1] * output.logdet).sum()
        return DiagonalKroneckerInverse(reciprocals, output.inverse, logdet)

    def scale(self, factor: Tensor | float) -> Self:
        """Multiply by a number, which goes into the output factor.

        Args:
            factor: Not negative.

        Returns:
            A new block.
        """
        check_factor(factor)
        return type(self)(self.input, self.output * factor)

    def _output_diagonal(self) -> Tensor:
        return self.output.diagonal(dim1=-2, dim2=-1)
