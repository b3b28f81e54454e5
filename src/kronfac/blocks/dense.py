"""Dense block: every entry kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from kronfac.blocks.base import Block, Inverse
from kronfac.blocks.checks import check_factor, check_square, check_tensors, check_vector
from kronfac.blocks.eigenbasis import Eigenbasis
from kronfac.blocks.inverses import DenseInverse
from kronfac.blocks.shifts import Shift, Uniform
from kronfac.linalg.factorise import eigh
from kronfac.linalg.inverse import invert


class Dense(Block):
    """A symmetric matrix over the row-major ``vec(V)`` for each stack element.

    Attributes:
        matrix: Shape ``[*stack, n, n]`` with ``n = d_out * d_in``.
    """

    kind = "dense"
    shifts = (Uniform,)

    def __init__(self, matrix: Tensor, shape: Sequence[int]) -> None:
        """Store the matrix; it is not copied.

        Args:
            matrix: Shape ``[*stack, n, n]``, float32 or float64. Symmetry is taken on trust.
            shape: ``[*stack, d_out, d_in]`` with ``d_out * d_in = n``.

        Raises:
            ValueError: If the shapes do not fit.
        """
        check_square("matrix", matrix)
        self.shape = torch.Size(shape)
        n = matrix.shape[-1]
        if len(self.shape) < 2 or self.shape[:-2] != matrix.shape[:-2] or self.shape[-2] * self.shape[-1] != n:
            raise ValueError(
                f"a matrix of shape {tuple(matrix.shape)} needs a shape [*stack, d_out, d_in] with d_out * d_in = {n}, "
                f"got {tuple(self.shape)}"
            )
        self.matrix = matrix

    def tensors(self) -> dict[str, Tensor]:
        """The matrix.

        Returns:
            ``{"matrix": M}``.
        """
        return {"matrix": self.matrix}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: torch.Size) -> Self:
        """Rebuild a block from what `tensors` gave.

        Args:
            tensors: ``{"matrix": M}``.
            shape: The block's shape.

        Returns:
            The block.
        """
        check_tensors(cls.kind, tensors, ("matrix",), shape, None)
        return cls(tensors["matrix"], shape)

    def matmul(self, vector: Tensor) -> Tensor:
        """Multiply by a vector.

        Args:
            vector: ``V``, shape ``[..., *stack, d_out, d_in]``.

        Returns:
            The product in the shape of ``vector``.
        """
        check_vector(vector, self.shape, self.dtype)
        return _product(self.matrix, vector)

    def trace(self) -> Tensor:
        """Trace.

        Returns:
            A 0-dim tensor.
        """
        return self.matrix.diagonal(dim1=-2, dim2=-1).sum()

    def diagonal(self) -> Tensor:
        """Diagonal.

        Returns:
            The diagonal in the block's shape.
        """
        return self.matrix.diagonal(dim1=-2, dim2=-1).reshape(self.shape)

    def frobenius_norm(self) -> Tensor:
        """Frobenius norm.

        Returns:
            A 0-dim tensor.
        """
        return torch.linalg.vector_norm(self.matrix)

    def matrices(self) -> Tensor:
        """One dense matrix for each stack element.

        Returns:
            Shape ``[*stack, n, n]``; not a copy.
        """
        return self.matrix

    def eigh(self) -> Eigenbasis:
        """Eigendecomposition.

        Returns:
            The eigenvalues, in the block's shape, with the maps into and out of the eigenbasis.
        """
        values, vectors = eigh(self.matrix, "the dense block")
        return Eigenbasis(values.reshape(self.shape), joint=vectors)

    def factorise(self, shift: Shift) -> Inverse:
        """Prepare to solve with the block after a shift is added, by Cholesky.

        Args:
            shift: `Uniform`; there are no two factors to share a `PerFactor`.

        Returns:
            A `DenseInverse`.
        """
        match shift:
            case Uniform():
                (result,) = invert([self.matrix], [shift.value], ["the dense block"])
                return DenseInverse(result.inverse, self.shape, result.logdet.sum())
            case _:
                self._refuse(shift)

    def scale(self, factor: Tensor | float) -> Self:
        """Multiply by a number.

        Args:
            factor: Not negative.

        Returns:
            A new block.
        """
        check_factor(factor)
        return type(self)(self.matrix * factor, self.shape)


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.flatten(-2).unsqueeze(-1)).reshape(vector.shape)
