"""The inverse of a block whose eigenvectors are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor

from kronfac.blocks.base import Inverse
from kronfac.blocks.checks import check_vector
from kronfac.blocks.eigenbasis import Eigenbasis
from kronfac.linalg.precision import without_autocast


class EigenInverse(Inverse):
    """``(C + shift I)^-1`` through the eigenvectors of ``C``.

    Attributes:
        basis: The eigendecomposition of ``C``.
        reciprocals: ``1 / (eigenvalue + shift)`` in the block's shape.
    """

    kind: ClassVar[str] = "eigen"

    def __init__(self, basis: Eigenbasis, shift: float) -> None:
        """Invert the eigenvalues.

        Args:
            basis: The eigendecomposition.
            shift: What is added to every eigenvalue.

        Raises:
            torch.linalg.LinAlgError: If an eigenvalue is not finite, or is zero to rounding and nothing is added to it,
                or too little for a finite reciprocal.
        """
        values = basis.values
        if not bool(values.isfinite().all()):
            raise torch.linalg.LinAlgError(
                "the block contains NaN or Inf: the statistics it was made of were not finite"
            )
        smallest, largest = (bound.item() for bound in values.aminmax())
        noise = torch.finfo(values.dtype).eps * max(values.shape[-2:]) * largest
        least = 1 / torch.finfo(values.dtype).max
        if smallest + shift <= least or (shift == 0 and smallest <= noise):
            raise torch.linalg.LinAlgError(
                f"the block of shape {tuple(values.shape)} is singular: its smallest eigenvalue is {smallest:.3g}, "
                f"its largest {largest:.3g}, and the damping {shift:.3g}. Use a larger damping"
            )
        self.basis = basis
        self.shape = values.shape
        self.reciprocals = (values + shift).reciprocal()

    @without_autocast
    def apply(self, vector: Tensor) -> Tensor:
        """Solve: into the eigenbasis, divide, and back.

        Args:
            vector: ``V``, shape ``[..., *stack, d_out, d_in]``.

        Returns:
            The solution in the shape of ``vector``.
        """
        check_vector(vector, self.shape, self.reciprocals.dtype)
        return self.basis.from_basis(self.basis.to_basis(vector) * self.reciprocals)

    @without_autocast
    def sqrt_apply(self, vector: Tensor) -> Tensor:
        """Multiply by the symmetric root of the inverse.

        Args:
            vector: ``V``, shape ``[..., *stack, d_out, d_in]``.

        Returns:
            The product in the shape of ``vector``.
        """
        check_vector(vector, self.shape, self.reciprocals.dtype)
        return self.basis.from_basis(self.basis.to_basis(vector) * self.reciprocals.sqrt())

    def logdet(self) -> Tensor:
        """Log-determinant of the damped block (not of its inverse).

        Returns:
            A 0-dim tensor.
        """
        return -self.reciprocals.log().sum()

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that, with `shape`, define the inverse.

        Returns:
            Tensors by name; `from_tensors` takes them back.
        """
        basis = self.basis
        named = {"values": basis.values, "output": basis.output, "input": basis.input, "joint": basis.joint}
        return {"reciprocals": self.reciprocals} | {name: t for name, t in named.items() if t is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: torch.Size) -> Self:
        """Rebuild an inverse from what `tensors` gave.

        Args:
            tensors: The tensors by name.
            shape: The block's shape.

        Returns:
            The inverse.
        """
        self = cls.__new__(cls)
        self.basis = Eigenbasis(tensors["values"], tensors.get("output"), tensors.get("input"), tensors.get("joint"))
        self.shape, self.reciprocals = shape, tensors["reciprocals"]
        return self
