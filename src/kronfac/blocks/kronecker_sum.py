"""Sum of two Kronecker products: the block of XK-FAC, a covariance term and a term of batch means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from kronfac.blocks.base import Block, Inverse
from kronfac.blocks.checks import check_factor, check_pair, check_tensors, check_vector
from kronfac.blocks.dense import Dense
from kronfac.blocks.diagonal_kronecker import DiagonalKronecker
from kronfac.blocks.eigenbasis import Eigenbasis
from kronfac.blocks.kronecker import Kronecker
from kronfac.blocks.scaled_kronecker import ScaledKronecker
from kronfac.blocks.shifts import PerFactor, Shift, Uniform
from kronfac.blocks.two_term import TwoTermInverse

_NAMES = ("input", "output", "second_input", "second_output")

#: Largest ``d_out * d_in`` for which the dense matrix is formed: 0.5 GiB in float64.
DENSE_LIMIT = 8192


class KroneckerSum(Block):
    """``C = G x A + G' x A'`` for each stack element, all four factors positive semi-definite.

    With ``G + output I`` and ``A + input I`` in the first term (`PerFactor`) the sum is inverted exactly by one
    congruence of each side, see `kronfac.linalg.kronecker_sum`. ``C + value I`` (`Uniform`) is a sum of *three*
    products, which no pair of congruences makes diagonal: it is inverted densely, and refused where ``d_out * d_in``
    exceeds `DENSE_LIMIT`; so are eigenvectors.

    Attributes:
        input: ``A``, shape ``[*stack, d_in, d_in]``.
        output: ``G``, shape ``[*stack, d_out, d_out]``.
        second_input: ``A'``, of the shape of ``A``.
        second_output: ``G'``, of the shape of ``G``.
    """

    kind = "kronecker_sum"
    shifts = (PerFactor, Uniform)

    def __init__(self, input: Tensor, output: Tensor, second_input: Tensor, second_output: Tensor) -> None:
        """Store the factors; they are not copied.

        Args:
            input: ``A``, shape ``[*stack, d_in, d_in]``, float32 or float64. Symmetry is taken on trust.
            output: ``G``, shape ``[*stack, d_out, d_out]``, of the same dtype and device.
            second_input: ``A'``, of the shape, dtype and device of ``A``.
            second_output: ``G'``, likewise of ``G``.

        Raises:
            ValueError: If the shapes do not fit.
        """
        self._terms = (Kronecker(input, output), Kronecker(second_input, second_output))
        check_pair(("input", "second_input"), input, second_input)
        if self._terms[0].shape != self._terms[1].shape:
            first, second = (tuple(term.shape) for term in self._terms)
            raise ValueError(f"the two terms make blocks of different shapes, {first} and {second}")
        self.input, self.output = input, output
        self.second_input, self.second_output = second_input, second_output
        self.shape = self._terms[0].shape

    def tensors(self) -> dict[str, Tensor]:
        """The four factors.

        Returns:
            ``{"input": A, "output": G, "second_input": A', "second_output": G'}``.
        """
        return {name: getattr(self, name) for name in _NAMES}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: torch.Size) -> Self:
        """Rebuild a block from what `tensors` gave.

        Args:
            tensors: The four factors by name.
            shape: The block's shape.

        Returns:
            The block.
        """
        check_tensors(cls.kind, tensors, _NAMES, shape, None)
        block = cls(**tensors)
        check_tensors(cls.kind, tensors, _NAMES, shape, block.shape)
        return block

    def terms(self) -> tuple[Kronecker, Kronecker]:
        """The two products; they share the factors.

        Returns:
            ``G x A`` and ``G' x A'``.
        """
        return self._terms

    def matmul(self, vector: Tensor) -> Tensor:
        """Multiply by a vector: ``G V A + G' V A'``.

        Args:
            vector: ``V``, shape ``[..., *stack, d_out, d_in]``.

        Returns:
            The product in the shape of ``vector``.
        """
        check_vector(vector, self.shape, self.dtype)
        return self._terms[0].matmul(vector) + self._terms[1].matmul(vector)

    def trace(self) -> Tensor:
        """Trace: the sum of the terms' traces.

        Returns:
            A 0-dim tensor.
        """
        return self._terms[0].trace() + self._terms[1].trace()

    def diagonal(self) -> Tensor:
        """Diagonal: the sum of the terms' diagonals.

        Returns:
            The diagonal in the block's shape.
        """
        return self._terms[0].diagonal() + self._terms[1].diagonal()

    def frobenius_norm(self) -> Tensor:
        """Frobenius norm, from inner products of the factors, none of which is negative.

        Returns:
            A 0-dim tensor.
        """
        return self.inner(self).clamp_min(0).sqrt()

    def _structured_inner(self, other: Block) -> Tensor | None:
        if isinstance(other, KroneckerSum):
            return self.inner(other._terms[0]) + self.inner(other._terms[1])
        if isinstance(other, (Kronecker, DiagonalKronecker, ScaledKronecker)):
            return self._terms[0].inner(other) + self._terms[1].inner(other)
        return None

    def factor_means(self) -> tuple[Tensor, Tensor]:
        """Mean eigenvalues of the factors of the first term, to which `PerFactor` adds.

        Returns:
            ``(tr A / d_in, tr G / d_out)``, each of shape ``[*stack]``.
        """
        return self._terms[0].factor_means()

    def matrices(self) -> Tensor:
        """One dense matrix for each stack element.

        Returns:
            Shape ``[*stack, n, n]`` with ``n = d_out * d_in``.
        """
        return self._terms[0].matrices() + self._terms[1].matrices()

    def eigh(self) -> Eigenbasis:
        """Eigendecomposition of the dense matrix.

        Returns:
            The eigenvalues, in the block's shape, with the maps into and out of the eigenbasis.
        """
        return self._dense("has no eigenvectors in closed form").eigh()

    def factorise(self, shift: Shift) -> Inverse:
        """Prepare to solve with the block after a shift is added.

        Args:
            shift: `PerFactor`, added to the factors of the first term: the inverse of
                ``(G + output I) x (A + input I) + G' x A'``; or `Uniform`, which is exact and dense.

        Returns:
            A `TwoTermInverse` or a `DenseInverse`.
        """
        match shift:
            case PerFactor():
                # In float64, in which it is inverted anyway: float32 would round what is added away.
                first = (_damped(self.input.double(), shift.input), _damped(self.output.double(), shift.output))
                second = (self.second_input.double(), self.second_output.double())
                return TwoTermInverse.of(first, second, name="the sum of two Kronecker products", dtype=self.dtype)
            case Uniform():
                return self._dense("plus a multiple of the identity has no inverse in closed form").factorise(shift)
            case _:
                self._refuse(shift)

    def scale(self, factor: Tensor | float) -> Self:
        """Multiply by a number, which goes into the output factors.

        Args:
            factor: Not negative.

        Returns:
            A new block.
        """
        check_factor(factor)
        return type(self)(self.input, self.output * factor, self.second_input, self.second_output * factor)

    def _dense(self, what: str) -> Dense:
        d_out, d_in = self.shape[-2:]
        if d_out * d_in > DENSE_LIMIT:
            raise ValueError(
                f"A sum of two Kronecker products {what}, and its dense matrix of width {d_out} x {d_in} = "
                f"{d_out * d_in} exceeds the limit of {DENSE_LIMIT}; damp it by rule='factored' "
                "(damping_rule='factored' of an optimiser), which is exact for the factors it damps."
            )
        return Dense(self.matrices(), self.shape)


def _damped(matrix: Tensor, shift: Tensor | float) -> Tensor:
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return matrix + (shift.to(matrix)[..., None, None] if isinstance(shift, Tensor) else shift) * eye
