"""Eigendecomposition of a block, as data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kronfac.linalg.products import matmul


@dataclass(frozen=True, eq=False)
class Eigenbasis:
    """Eigenvalues of a block and the orthonormal bases that lead into its eigenbasis.

    Attributes:
        values: Eigenvalues in the block's shape ``[*stack, d_out, d_in]``: that of the coordinate at the same place in
            the eigenbasis. Not sorted; never negative.
        output: Eigenvectors of the output side in columns, ``[*stack, d_out, d_out]``; None for the identity.
        input: Eigenvectors of the input side in columns, ``[*stack, d_in, d_in]``; None for the identity.
        joint: Eigenvectors over ``vec(V)``, ``[*stack, n, n]``, for a block without factors; None for the identity.
    """

    values: Tensor
    output: Tensor | None = None
    input: Tensor | None = None
    joint: Tensor | None = None

    def to_basis(self, vector: Tensor) -> Tensor:
        """Coordinates in the eigenbasis.

        Args:
            vector: ``V``, shape ``[..., *stack, d_out, d_in]``.

        Returns:
            ``Qᵀ vec(V)`` in the shape of ``vector``.
        """
        if self.joint is not None:
            vector = (self.joint.mT @ vector.flatten(-2).unsqueeze(-1)).reshape(vector.shape)
        if self.output is not None:
            vector = matmul(self.output.mT, vector)
        return vector if self.input is None else matmul(vector, self.input)

    def from_basis(self, vector: Tensor) -> Tensor:
        """Back from coordinates in the eigenbasis.

        Args:
            vector: Shape ``[..., *stack, d_out, d_in]``.

        Returns:
            ``Q vec(V)`` in the shape of ``vector``.
        """
        if self.joint is not None:
            vector = (self.joint @ vector.flatten(-2).unsqueeze(-1)).reshape(vector.shape)
        if self.output is not None:
            vector = matmul(self.output, vector)
        return vector if self.input is None else matmul(vector, self.input.mT)

    def spectrum(self) -> Tensor:
        """All eigenvalues.

        Returns:
            Shape ``[P]``, ascending.
        """
        return self.values.flatten().sort().values
