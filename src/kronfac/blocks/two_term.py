"""The inverse of a sum or difference of two Kronecker products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor

from kronfac.blocks.base import Inverse
from kronfac.blocks.checks import check_pair, check_precision, check_square, check_vector
from kronfac.linalg.kronecker_sum import diagonalise_sum
from kronfac.linalg.precision import without_autocast


class TwoTermInverse(Inverse):
    """``(G x A ± G' x A')^-1``: four products and one elementwise factor per solve.

    Attributes:
        input: ``K_A``, shape ``[*stack, d_in, d_in]``, of the congruence that makes both input factors diagonal.
        output: ``K_G``, shape ``[*stack, d_out, d_out]``, the same for the output factors.
        values: What the two make of the matrix, positive, shape ``[*stack, d_out, d_in]``.
    """

    kind: ClassVar[str] = "two_term"

    def __init__(self, input: Tensor, output: Tensor, values: Tensor, logdet: Tensor) -> None:
        """Store the congruence; `of` makes it.

        Args:
            input: ``K_A``, shape ``[*stack, d_in, d_in]``, float32 or float64.
            output: ``K_G``, shape ``[*stack, d_out, d_out]``.
            values: Shape ``[*stack, d_out, d_in]``.
            logdet: Log-determinant of what was inverted, 0-dim.

        Raises:
            ValueError: If shapes or devices do not fit.
        """
        check_square("input", input)
        check_square("output", output)
        check_pair(("input", "output"), input, output)
        check_precision("values", values)
        if input.shape[:-2] != output.shape[:-2] or values.shape != (*output.shape[:-1], input.shape[-1]):
            raise ValueError(
                f"input {tuple(input.shape)}, output {tuple(output.shape)} and values {tuple(values.shape)} do not fit"
            )
        self.input = input
        self.output = output
        self.values = values
        self.shape = values.shape
        self._logdet = logdet

    @classmethod
    def of(
        cls,
        first: tuple[Tensor, Tensor],
        second: tuple[Tensor, Tensor],
        sign: int = 1,
        name: str = "the sum",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Invert ``G x A + sign · G' x A'``.

        Args:
            first: ``(A, G)``, symmetric positive semi-definite.
            second: ``(A', G')``, of the same shapes.
            sign: 1 or -1.
            name: What to call the matrix in an error.
            dtype: Dtype of the inverse; that of the factors by default.

        Returns:
            The inverse.
        """
        found = diagonalise_sum(first, second, sign, name)
        input, output, values, logdet = (part.to(dtype) for part in (*found[:3], found.logdet.sum()))
        return cls(input, output, values, logdet)

    @without_autocast
    def apply(self, vector: Tensor) -> Tensor:
        """Solve: ``K_G ((K_G^T V K_A) / values) K_A^T``.

        Args:
            vector: ``V``, shape ``[..., *stack, d_out, d_in]``.

        Returns:
            The solution in the shape of ``vector``.
        """
        check_vector(vector, self.shape, self.input.dtype)
        return self.output @ ((self.output.mT @ vector @ self.input) / self.values) @ self.input.mT

    @without_autocast
    def sqrt_apply(self, vector: Tensor) -> Tensor:
        """Multiply by the root ``(K_G x K_A) diag(values^-1/2)``.

        Args:
            vector: ``V``, shape ``[..., *stack, d_out, d_in]``.

        Returns:
            The product in the shape of ``vector``.
        """
        check_vector(vector, self.shape, self.input.dtype)
        return self.output @ (vector / self.values.sqrt()) @ self.input.mT

    def logdet(self) -> Tensor:
        """Log-determinant of the sum or difference (not of its inverse).

        Returns:
            A 0-dim tensor.
        """
        return self._logdet

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that, with `shape`, define the inverse.

        Returns:
            Tensors by name; `from_tensors` takes them back.
        """
        return {"input": self.input, "output": self.output, "values": self.values, "logdet": self._logdet}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: torch.Size) -> Self:
        """Rebuild an inverse from what `tensors` gave.

        Args:
            tensors: The tensors by name.
            shape: The block's shape.

        Returns:
            The inverse.
        """
        return cls(tensors["input"], tensors["output"], tensors["values"], tensors["logdet"])
