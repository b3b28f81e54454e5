"""The inverses that blocks are factorised into."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from kronfac.blocks.base import Inverse
from kronfac.blocks.checks import check_pair, check_square, check_vector
from kronfac.linalg.factorise import cholesky
from kronfac.linalg.precision import without_autocast
from kronfac.linalg.products import matmul
from kronfac.linalg.symmetric import with_even_rows


class KroneckerInverse(Inverse):
    """``G^-1 x A^-1`` from two explicit symmetric inverses: two products per solve.

    Attributes:
        input: Inverse of the input factor, shape ``[*stack, d_in, d_in]``.
        output: Inverse of the output factor, shape ``[*stack, d_out, d_out]``.
    """

    kind: ClassVar[str] = "kronecker"

    def __init__(self, input: Tensor, output: Tensor, logdet: Tensor | None = None) -> None:
        """Store the inverses.

        Args:
            input: Inverse of the input factor, shape ``[*stack, d_in, d_in]``, float32 or float64.
            output: Inverse of the output factor, shape ``[*stack, d_out, d_out]``.
            logdet: Log-determinant of the product that was inverted, 0-dim; taken from the inverses when it is asked
                for and was not given, which loses digits for an ill-conditioned factor.

        Raises:
            ValueError: If shapes or devices do not fit.
        """
        check_square("input", input)
        check_square("output", output)
        check_pair(("input", "output"), input, output)
        if input.shape[:-2] != output.shape[:-2]:
            raise ValueError(f"input {tuple(input.shape)} and output {tuple(output.shape)} have different stacks")
        self.input = with_even_rows(input)
        self.output = with_even_rows(output)
        self.shape = torch.Size([*output.shape[:-1], input.shape[-1]])
        self._logdet = logdet

    @without_autocast
    def apply(self, vector: Tensor) -> Tensor:
        """Solve: ``G^-1 V A^-1``.

        Args:
            vector: ``V``, shape ``[..., *stack, d_out, d_in]``.

        Returns:
            The solution in the shape of ``vector``.
        """
        check_vector(vector, self.shape, self.input.dtype)
        return matmul(matmul(self.output, vector), self.input)

    @without_autocast
    def sqrt_apply(self, vector: Tensor) -> Tensor:
        """Multiply by the lower-triangular root ``L_G x L_A`` made of the Cholesky factors of the two inverses.

        Args:
            vector: ``V``, shape ``[..., *stack, d_out, d_in]``.

        Returns:
            ``L_G V L_A^T`` in the shape of ``vector``.
        """
        check_vector(vector, self.shape, self.input.dtype)
        input_root, output_root = self._roots
        return output_root @ vector @ input_root.mT

    def logdet(self) -> Tensor:
        """Log-determinant of the damped Kronecker product (not of its inverse).

        Returns:
            A 0-dim tensor.
        """
        if self._logdet is None:
            input_log, output_log = (-2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1) for root in self._roots)
            self._logdet = (self.shape[-2] * input_log + self.shape[-1] * output_log).sum()
        return self._logdet

    @cached_property
    def _roots(self) -> tuple[Tensor, Tensor]:
        return cholesky(self.input, "the inverse input factor"), cholesky(self.output, "the inverse output factor")

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that, with `shape`, define the inverse.

        Returns:
            Tensors by name; `from_tensors` takes them back.
        """
        known = {} if self._logdet is None else {"logdet": self._logdet}
        return {"input": self.input, "output": self.output} | known

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: torch.Size) -> Self:
        """Rebuild an inverse from what `tensors` gave.

        Args:
            tensors: The tensors by name.
            shape: The block's shape.

        Returns:
            The inverse.
        """
        return cls(tensors["input"], tensors["output"], tensors.get("logdet"))


class DiagonalKroneckerInverse(Inverse):
    """``G^-1 x diag(1/a)``: one product and one elementwise factor per solve.

    Attributes:
        input: Reciprocals of the damped input diagonal, shape ``[*stack, d_in]``.
        output: Inverse of the output factor, shape ``[*stack, d_out, d_out]``.
    """

    kind: ClassVar[str] = "diagonal_kronecker"

    def __init__(self, input: Tensor, output: Tensor, logdet: Tensor) -> None:
        """Store the inverses.

        Args:
            input: Reciprocals of the damped input diagonal, shape ``[*stack, d_in]``.
            output: Inverse of the output factor, shape ``[*stack, d_out, d_out]``.
            logdet: Log-determinant of what was inverted, 0-dim.
        """
        self.input = input
        self.output = output
        self.shape = torch.Size([*output.shape[:-1], input.shape[-1]])
        self._logdet = logdet

    @without_autocast
    def apply(self, vector: Tensor) -> Tensor:
        """Solve: ``G^-1 V diag(1/a)``.

        Args:
            vector: ``V``, shape ``[..., *stack, d_out, d_in]``.

        Returns:
            The solution in the shape of ``vector``.
        """
        check_vector(vector, self.shape, self.input.dtype)
        return self.output @ vector * self.input.unsqueeze(-2)

    @without_autocast
    def sqrt_apply(self, vector: Tensor) -> Tensor:
        """Multiply by the lower-triangular root ``L_G x diag(a^-1/2)``, ``L_G`` the Cholesky factor of ``G^-1``.

        Args:
            vector: ``V``, shape ``[..., *stack, d_out, d_in]``.

        Returns:
            The product in the shape of ``vector``.
        """
        check_vector(vector, self.shape, self.input.dtype)
        return self._root @ vector * self.input.sqrt().unsqueeze(-2)

    def logdet(self) -> Tensor:
        """Log-determinant of the damped block (not of its inverse).

        Returns:
            A 0-dim tensor.
        """
        return self._logdet

    @cached_property
    def _root(self) -> Tensor:
        return cholesky(self.output, "the inverse output factor")

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that, with `shape`, define the inverse.

        Returns:
            Tensors by name; `from_tensors` takes them back.
        """
        return {"input": self.input, "output": self.output, "logdet": self._logdet}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: torch.Size) -> Self:
        """Rebuild an inverse from what `tensors` gave.

        Args:
            tensors: The tensors by name.
            shape: The block's shape.

        Returns:
            The inverse.
        """
        return cls(tensors["input"], tensors["output"], tensors["logdet"])


class DenseInverse(Inverse):
    """An explicit symmetric inverse for each stack element.

    Attributes:
        matrix: The inverses, shape ``[*stack, n, n]`` with ``n = d_out * d_in``.
    """

    kind: ClassVar[str] = "dense"

    def __init__(self, matrix: Tensor, shape: torch.Size, logdet: Tensor) -> None:
        """Store the inverse.

        Args:
            matrix: The inverses, shape ``[*stack, n, n]``.
            shape: ``[*stack, d_out, d_in]``.
            logdet: Log-determinant of what was inverted, 0-dim.
        """
        self.matrix = matrix
        self.shape = shape
        self._logdet = logdet

    @without_autocast
    def apply(self, vector: Tensor) -> Tensor:
        """Solve.

        Args:
            vector: ``V``, shape ``[..., *stack, d_out, d_in]``.

        Returns:
            The solution in the shape of ``vector``.
        """
        check_vector(vector, self.shape, self.matrix.dtype)
        return (self.matrix @ vector.flatten(-2).unsqueeze(-1)).reshape(vector.shape)

    @without_autocast
    def sqrt_apply(self, vector: Tensor) -> Tensor:
        """Multiply by the lower-triangular Cholesky factor of the inverse.

        Args:
            vector: ``V``, shape ``[..., *stack, d_out, d_in]``.

        Returns:
            The product in the shape of ``vector``.
        """
        check_vector(vector, self.shape, self.matrix.dtype)
        return (self._root @ vector.flatten(-2).unsqueeze(-1)).reshape(vector.shape)

    def logdet(self) -> Tensor:
        """Log-determinant of the damped block (not of its inverse).

        Returns:
            A 0-dim tensor.
        """
        return self._logdet

    @cached_property
    def _root(self) -> Tensor:
        return cholesky(self.matrix, "the inverse of a dense block")

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that, with `shape`, define the inverse.

        Returns:
            Tensors by name; `from_tensors` takes them back.
        """
        return {"matrix": self.matrix, "logdet": self._logdet}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: torch.Size) -> Self:
        """Rebuild an inverse from what `tensors` gave.

        Args:
            tensors: The tensors by name.
            shape: The block's shape.

        Returns:
            The inverse.
        """
        return cls(tensors["matrix"], shape, tensors["logdet"])
