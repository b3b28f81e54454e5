"""Kronecker product of two factors of unit trace, scaled: the block of TKFAC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from kronfac.blocks.base import Block, Inverse
from kronfac.blocks.checks import check_factor, check_pair, check_precision, check_tensors
from kronfac.blocks.diagonal_kronecker import DiagonalKronecker
from kronfac.blocks.eigenbasis import Eigenbasis
from kronfac.blocks.kronecker import Kronecker
from kronfac.blocks.shifts import PerFactor, Rescaled, Shift, Uniform

_NAMES = ("input", "output", "delta")


class ScaledKronecker(Block):
    """``C = delta (Psi x Phi)`` for each stack element, ``tr Phi = tr Psi = 1`` (Gao et al. 2020, equation 4.3).

    It computes as the Kronecker product it is. Shifts of single factors meet it in balance, as ``sqrt(delta) Phi`` and
    ``sqrt(delta) Psi`` (equation 5.15).

    Attributes:
        input: ``Phi``, symmetric positive semi-definite of unit trace, shape ``[*stack, d_in, d_in]``, or ``[*stack,
            d_in]`` where it is diagonal.
        output: ``Psi``, likewise, shape ``[*stack, d_out, d_out]``.
        delta: The trace of the block, shape ``[*stack]``.
    """

    kind = "scaled_kronecker"
    shifts = (PerFactor, Rescaled, Uniform)

    def __init__(self, input: Tensor, output: Tensor, delta: Tensor) -> None:
        """Store factors and scale; they are not copied, and their unit traces are taken on trust.

        Args:
            input: ``Phi``, shape ``[*stack, d_in, d_in]`` or ``[*stack, d_in]``, float32 or float64.
            output: ``Psi``, shape ``[*stack, d_out, d_out]``, of the same dtype and device.
            delta: The scale, not negative, shape ``[*stack]``, of the same dtype and device.

        Raises:
            ValueError: If the shapes do not fit.
        """
        for name, tensor in zip(_NAMES, (input, output, delta), strict=True):
            check_precision(name, tensor)
        check_pair(("output", "delta"), output, delta)
        self._product_type = DiagonalKronecker if input.ndim == output.ndim - 1 else Kronecker
        self.shape = self._product_type(input, output).shape
        if delta.shape != self.shape[:-2]:
            raise ValueError(f"delta must have the stack's shape {tuple(self.shape[:-2])}, got {tuple(delta.shape)}")
        self.input, self.output, self.delta = input, output, delta

    @classmethod
    def from_moments(cls, input: Tensor, output: Tensor) -> Self:
        """Normalise the two partial traces of a block (Gao et al. 2020, equation 4.9).

        Args:
            input: ``E[|u|^2 a a^T]``, shape ``[*stack, d_in, d_in]``, or its diagonal ``[*stack, d_in]``.
            output: ``E[|a|^2 u u^T]``, shape ``[*stack, d_out, d_out]``; the two traces are equal but for rounding.

        Returns:
            The block whose partial traces they are; where they vanish, multiples of the identity scaled by zero.
        """
        diagonal = input.ndim == output.ndim - 1
        delta = _trace(output)
        return cls(_normalised(input, diagonal), _normalised(output, False), delta)

    def tensors(self) -> dict[str, Tensor]:
        """Both factors and the scale.

        Returns:
            ``{"input": Phi, "output": Psi, "delta": delta}``.
        """
        return {"input": self.input, "output": self.output, "delta": self.delta}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: torch.Size) -> Self:
        """Rebuild a block from what `tensors` gave.

        Args:
            tensors: ``{"input": Phi, "output": Psi, "delta": delta}``.
            shape: The block's shape.

        Returns:
            The block.
        """
        check_tensors(cls.kind, tensors, _NAMES, shape, None)
        block = cls(**tensors)
        check_tensors(cls.kind, tensors, _NAMES, shape, block.shape)
        return block

    def product(self) -> Kronecker | DiagonalKronecker:
        """Return the same matrix as a plain Kronecker product, the scale in its output factor.

        Returns:
            The product; it shares the input factor.
        """
        return self._product_type(self.input, self.output * self.delta[..., None, None])

    def balanced(self, scale: Tensor | None = None) -> Kronecker | DiagonalKronecker:
        """Return ``(sqrt(scale) Psi) x (sqrt(scale) Phi)``.

        Args:
            scale: Shape ``[*stack]``; `delta` by default.

        Returns:
            The product, with both factors of equal trace.
        """
        root = (self.delta if scale is None else scale.to(self.delta)).sqrt()
        input = self.input * (root[..., None] if self._product_type is DiagonalKronecker else root[..., None, None])
        return self._product_type(input, self.output * root[..., None, None])

    def matmul(self, vector: Tensor) -> Tensor:
        """Multiply by a vector: ``delta Psi V Phi``.

        Args:
            vector: ``V``, shape ``[..., *stack, d_out, d_in]``.

        Returns:
            The product in the shape of ``vector``.
        """
        return self.product().matmul(vector)

    def trace(self) -> Tensor:
        """Trace ``delta``, summed over the stack.

        Returns:
            A 0-dim tensor.
        """
        return self.product().trace()

    def diagonal(self) -> Tensor:
        """Diagonal.

        Returns:
            The diagonal in the block's shape.
        """
        return self.product().diagonal()

    def frobenius_norm(self) -> Tensor:
        """Frobenius norm.

        Returns:
            A 0-dim tensor.
        """
        return self.product().frobenius_norm()

    def _structured_inner(self, other: Block) -> Tensor | None:
        return self.product().inner(other.product() if isinstance(other, ScaledKronecker) else other)

    def factor_means(self) -> tuple[Tensor, Tensor]:
        """Mean eigenvalues of the balanced factors.

        Returns:
            ``(sqrt(delta) / d_in, sqrt(delta) / d_out)``, each of shape ``[*stack]``.
        """
        return self.balanced().factor_means()

    def matrices(self) -> Tensor:
        """One dense matrix for each stack element.

        Returns:
            Shape ``[*stack, n, n]`` with ``n = d_out * d_in``.
        """
        return self.product().matrices()

    def eigh(self) -> Eigenbasis:
        """Eigendecomposition: products of the factors' eigenvalues.

        Returns:
            The eigenvalues, in the block's shape, with the maps into and out of the eigenbasis.
        """
        return self.product().eigh()

    def factorise(self, shift: Shift) -> Inverse:
        """Prepare to solve with the block after a shift is added.

        Args:
            shift: `PerFactor`, added to the balanced factors; `Rescaled`, which replaces the scale before; or
                `Uniform`, which is exact, through eigenvectors.

        Returns:
            A `KroneckerInverse`, a `DiagonalKroneckerInverse` or an `EigenInverse`.

        Raises:
            torch.linalg.LinAlgError: The scale is not finite, or the damped block cannot be inverted.
        """
        if not bool((self.delta.isfinite() & (self.delta >= 0)).all()):
            raise torch.linalg.LinAlgError("the scale of the block is negative, NaN or Inf")
        match shift:
            case PerFactor():
                return self.balanced().factorise(shift)
            case Rescaled():
                return self.balanced(shift.scale).factorise(PerFactor(shift.input, shift.output))
            case Uniform():
                return self.product().factorise(shift)
            case _:
                self._refuse(shift)

    def scale(self, factor: Tensor | float) -> Self:
        """Multiply by a number, which goes into the scale.

        Args:
            factor: Not negative.

        Returns:
            A new block.
        """
        check_factor(factor)
        # Without a stack both are 0-dim, and a float64 factor would make a float64 scale.
        return type(self)(self.input, self.output, (self.delta * factor).to(self.delta))


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def _normalised(moment: Tensor, diagonal: bool) -> Tensor:
    """Divide by the trace; a multiple of the identity where that is zero."""
    trace = (moment if diagonal else moment.diagonal(dim1=-2, dim2=-1)).sum(-1, keepdim=True)
    empty = trace == 0
    divisor = torch.where(empty, torch.ones_like(trace), trace)
    result = moment / (divisor if diagonal else divisor.unsqueeze(-1))
    entries = result if diagonal else result.diagonal(dim1=-2, dim2=-1)
    entries.copy_(torch.where(empty, torch.full_like(trace, 1 / entries.shape[-1]), entries))
    return result
