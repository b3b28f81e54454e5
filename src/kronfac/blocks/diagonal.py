"""Diagonal block: one curvature per parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from kronfac.blocks.base import Block, Inverse
from kronfac.blocks.checks import check_factor, check_precision, check_tensors, check_vector
from kronfac.blocks.eigen_inverse import EigenInverse
from kronfac.blocks.eigenbasis import Eigenbasis
from kronfac.blocks.shifts import Shift, Uniform


class Diagonal(Block):
    """``C = diag(d)``; every operation is elementwise.

    Attributes:
        values: ``d``, not negative, in the shape of ``V``.
    """

    kind = "diagonal"
    shifts = (Uniform,)

    def __init__(self, values: Tensor) -> None:
        """Store the diagonal; it is not copied.

        Args:
            values: ``d``, shape ``[*stack, d_out, d_in]``, float32 or float64.

        Raises:
            ValueError: If it has fewer than two dimensions.
        """
        check_precision("values", values)
        if values.ndim < 2:
            raise ValueError(f"values must have shape [*stack, d_out, d_in], got {tuple(values.shape)}")
        self.values = values
        self.shape = values.shape

    def tensors(self) -> dict[str, Tensor]:
        """The diagonal.

        Returns:
            ``{"values": d}``.
        """
        return {"values": self.values}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: torch.Size) -> Self:
        """Rebuild a block from what `tensors` gave.

        Args:
            tensors: ``{"values": d}``.
            shape: The block's shape.

        Returns:
            The block.
        """
        check_tensors(cls.kind, tensors, ("values",), shape, None)
        check_tensors(cls.kind, tensors, ("values",), shape, tensors["values"].shape)
        return cls(tensors["values"])

    def matmul(self, vector: Tensor) -> Tensor:
        """Multiply by a vector, elementwise.

        Args:
            vector: ``V``, shape ``[..., *stack, d_out, d_in]``.

        Returns:
            The product in the shape of ``vector``.
        """
        check_vector(vector, self.shape, self.dtype)
        return self.values * vector

    def trace(self) -> Tensor:
        """Trace.

        Returns:
            A 0-dim tensor.
        """
        return self.values.sum()

    def diagonal(self) -> Tensor:
        """Diagonal.

        Returns:
            The diagonal in the block's shape; not a copy.
        """
        return self.values

    def frobenius_norm(self) -> Tensor:
        """Frobenius norm.

        Returns:
            A 0-dim tensor.
        """
        return torch.linalg.vector_norm(self.values)

    def _structured_inner(self, other: Block) -> Tensor | None:
        return (self.values * other.diagonal()).sum()

    def matrices(self) -> Tensor:
        """One dense matrix for each stack element.

        Returns:
            Shape ``[*stack, n, n]`` with ``n = d_out * d_in``.
        """
        return torch.diag_embed(self.values.flatten(-2))

    def eigh(self) -> Eigenbasis:
        """Eigendecomposition: the diagonal itself, in the basis it is given in.

        Returns:
            The eigenvalues with two identity maps.
        """
        return Eigenbasis(self.values.clamp_min(0))

    def factorise(self, shift: Shift) -> Inverse:
        """Prepare to solve with the block after a shift is added.

        Args:
            shift: `Uniform`; there are no two factors to share a `PerFactor`.

        Returns:
            An `EigenInverse`.
        """
        match shift:
            case Uniform():
                return EigenInverse(self.eigh(), shift.value)
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
        return type(self)(self.values * factor)
