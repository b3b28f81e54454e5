"""Diagonal in a Kronecker eigenbasis: the block of EKFAC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from kronfac.blocks.base import Block, Inverse
from kronfac.blocks.checks import check_factor, check_pair, check_precision, check_square, check_tensors, check_vector
from kronfac.blocks.diagonal_kronecker import DiagonalKronecker
from kronfac.blocks.eigen_inverse import EigenInverse
from kronfac.blocks.eigenbasis import Eigenbasis
from kronfac.blocks.kronecker import Kronecker
from kronfac.blocks.shifts import Shift, Uniform


class EigenKronecker(Block):
    """``C vec(V) = vec(Q_G (S ⊙ (Q_Gᵀ V Q_A)) Q_Aᵀ)`` for each stack element (George et al. 2018, section 3).

    A Kronecker product is the case ``S = s_G s_Aᵀ``; here the ``d_out · d_in`` values are free.

    Attributes:
        values: ``S``, not negative, in the shape of ``V``.
        output: ``Q_G``, orthonormal columns, shape ``[*stack, d_out, d_out]``.
        input: ``Q_A``, orthonormal columns, shape ``[*stack, d_in, d_in]``; None for the identity (embeddings).
    """

    kind = "eigen_kronecker"
    shifts = (Uniform,)

    def __init__(self, values: Tensor, output: Tensor, input: Tensor | None) -> None:
        """Store values and bases; they are not copied.

        Args:
            values: ``S``, shape ``[*stack, d_out, d_in]``, float32 or float64.
            output: ``Q_G``, shape ``[*stack, d_out, d_out]``, of the same dtype and device. That its columns are
                orthonormal is taken on trust.
            input: ``Q_A``, shape ``[*stack, d_in, d_in]``, or None for the identity.

        Raises:
            ValueError: If the shapes do not fit.
        """
        check_precision("values", values)
        if values.ndim < 2:
            raise ValueError(f"values must have shape [*stack, d_out, d_in], got {tuple(values.shape)}")
        for name, basis, width in (("output", output, values.shape[-2]), ("input", input, values.shape[-1])):
            if basis is None:
                continue
            check_square(name, basis)
            check_pair(("values", name), values, basis)
            if basis.shape != (*values.shape[:-2], width, width):
                raise ValueError(
                    f"values of shape {tuple(values.shape)} need {name} of shape "
                    f"{(*values.shape[:-2], width, width)} with the same stack, got {tuple(basis.shape)}"
                )
        self.values = values
        self.output = output
        self.input = input
        self.shape = values.shape

    def tensors(self) -> dict[str, Tensor]:
        """Values and bases.

        Returns:
            ``{"values": S, "output": Q_G, "input": Q_A}``, without the input basis where it is the identity.
        """
        named = {"values": self.values, "output": self.output}
        return named if self.input is None else named | {"input": self.input}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: torch.Size) -> Self:
        """Rebuild a block from what `tensors` gave.

        Args:
            tensors: ``{"values": S, "output": Q_G, "input": Q_A}``; without an input basis it is the identity.
            shape: The block's shape.

        Returns:
            The block.
        """
        names = ("values", "output", "input")[: 3 if "input" in tensors else 2]
        check_tensors(cls.kind, tensors, names, shape, None)
        block = cls(tensors["values"], tensors["output"], tensors.get("input"))
        check_tensors(cls.kind, tensors, names, shape, block.shape)
        return block

    def matmul(self, vector: Tensor) -> Tensor:
        """Multiply by a vector: into the eigenbasis, times ``S``, and back.

        Args:
            vector: ``V``, shape ``[..., *stack, d_out, d_in]``.

        Returns:
            The product in the shape of ``vector``.
        """
        check_vector(vector, self.shape, self.dtype)
        basis = self._basis
        return basis.from_basis(self.values * basis.to_basis(vector))

    def trace(self) -> Tensor:
        """Trace: the sum of the values.

        Returns:
            A 0-dim tensor.
        """
        return self.values.sum()

    def diagonal(self) -> Tensor:
        """Diagonal ``(Q_G ⊙ Q_G) S (Q_A ⊙ Q_A)ᵀ``.

        Returns:
            The diagonal in the block's shape.
        """
        half = self.output.square() @ self.values
        return half if self.input is None else half @ self.input.square().mT

    def frobenius_norm(self) -> Tensor:
        """Frobenius norm: that of the values.

        Returns:
            A 0-dim tensor.
        """
        return torch.linalg.vector_norm(self.values)

    def _structured_inner(self, other: Block) -> Tensor | None:
        # tr(C D) = Σ S ⊙ diag(Qᵀ D Q), with Q the Kronecker basis of C.
        if isinstance(other, EigenKronecker):
            return (self.values * change_basis(other.values, self._basis, other._basis)).sum()
        if not isinstance(other, (Kronecker, DiagonalKronecker)):
            return None
        outputs = _rotated_diagonal(self.output, other.output)
        if isinstance(other, Kronecker):
            diagonal = other.input.diagonal(dim1=-2, dim2=-1)
            inputs = diagonal if self.input is None else _rotated_diagonal(self.input, other.input)
        else:
            squares = None if self.input is None else self.input.square()
            inputs = other.input if squares is None else (squares * other.input.unsqueeze(-1)).sum(-2)
        return (self.values * outputs.unsqueeze(-1) * inputs.unsqueeze(-2)).sum()

    def matrices(self) -> Tensor:
        """One dense matrix for each stack element.

        Returns:
            Shape ``[*stack, n, n]`` with ``n = d_out * d_in``.
        """
        input = self.input
        if input is None:
            eye = torch.eye(self.shape[-1], dtype=self.dtype, device=self.device)
            input = eye.expand(*self.shape[:-2], -1, -1)
        vectors = Kronecker(input, self.output).matrices()
        return vectors * self.values.flatten(-2).unsqueeze(-2) @ vectors.mT

    def eigh(self) -> Eigenbasis:
        """Eigendecomposition, which is what is stored.

        Returns:
            The eigenvalues with the bases.

        Raises:
            torch.linalg.LinAlgError: If a basis holds NaN or Inf.
        """
        for name, basis in (("output", self.output), ("input", self.input)):
            if basis is not None and not bool(basis.isfinite().all()):
                raise torch.linalg.LinAlgError(f"the {name} basis contains NaN or Inf: its statistics were not finite")
        return self._basis

    def factorise(self, shift: Shift) -> Inverse:
        """Prepare to solve with the block after a shift is added; costs one reciprocal per value.

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
        """Multiply by a number, which goes into the values.

        Args:
            factor: Not negative.

        Returns:
            A new block.
        """
        check_factor(factor)
        return type(self)(self.values * factor, self.output, self.input)

    @property
    def _basis(self) -> Eigenbasis:
        return Eigenbasis(self.values.clamp_min(0), output=self.output, input=self.input)


def change_basis(values: Tensor, new: Eigenbasis, old: Eigenbasis) -> Tensor:
    """Diagonal, in a new Kronecker basis, of the matrix that is ``diag(values)`` in an old one.

    ``(P_G ⊙ P_G) S (P_A ⊙ P_A)ᵀ`` with ``P = Q_newᵀ Q_old`` on each side: of all matrices that are diagonal in the new
    basis the nearest one in Frobenius norm, and of the same trace.

    Args:
        values: ``S``, shape ``[*stack, d_out, d_in]``.
        new: The new bases; its own values are not used.
        old: The old bases; its own values are not used.

    Returns:
        The diagonal in the shape of ``values``.
    """
    outputs = _squared_overlap(new.output, old.output)
    inputs = _squared_overlap(new.input, old.input)
    half = values if outputs is None else outputs @ values
    return half if inputs is None else half @ inputs.mT


def _squared_overlap(new: Tensor | None, old: Tensor | None) -> Tensor | None:
    if new is None:
        return None if old is None else old.square()
    return (new.mT if old is None else new.mT @ old).square()


def _rotated_diagonal(basis: Tensor, matrix: Tensor) -> Tensor:
    """Diagonal of ``Qᵀ M Q``."""
    return (basis * (matrix @ basis)).sum(-2)
