"""What a matrix over the parameters of several layers can do that is not block diagonal over them.

A vector is a mapping ``{layer name: V}`` with the layers' matrices ``V``; further dimensions in front are a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from kronfac.blocks.base import Block
from kronfac.blocks.shifts import Shift


class CoupledBlocks(ABC):
    """A symmetric positive semi-definite matrix over the parameters of several layers.

    Attributes:
        blocks: Its diagonal blocks, ``{layer name: Block}``.
    """

    blocks: dict[str, Block]

    @abstractmethod
    def matmul(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply by a vector.

        Args:
            vectors: ``V`` of every layer, shapes ``[..., d_out, d_in]``.

        Returns:
            The product, of the same form.
        """

    @abstractmethod
    def frobenius_norm(self) -> Tensor:
        """Frobenius norm.

        Returns:
            A 0-dim tensor.
        """

    @abstractmethod
    def factorise(self, shifts: Mapping[str, Shift]) -> CoupledInverse:
        """Prepare to solve with the matrix after its diagonal blocks were shifted.

        Args:
            shifts: What is added to each layer's diagonal block.

        Returns:
            The inverse.
        """

    @abstractmethod
    def scale(self, factor: Tensor | float) -> Self:
        """Multiply by a number.

        Args:
            factor: Not negative.

        Returns:
            New blocks.
        """

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the blocks, float32 or float64."""
        return next(iter(self.blocks.values())).dtype

    @property
    def device(self) -> torch.device:
        """Device of the blocks."""
        return next(iter(self.blocks.values())).device


class CoupledInverse(ABC):
    """The inverse of such a matrix."""

    @abstractmethod
    def apply(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Solve.

        Args:
            vectors: ``V`` of every layer, shapes ``[..., d_out, d_in]``.

        Returns:
            The solution, of the same form.
        """

    @abstractmethod
    def sqrt_apply(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply by a root ``S`` of the inverse, ``S S^T = inverse``.

        Args:
            vectors: ``V`` of every layer, shapes ``[..., d_out, d_in]``.

        Returns:
            The product, of the same form.
        """

    @abstractmethod
    def logdet(self) -> Tensor:
        """Log-determinant of the shifted matrix (not of its inverse).

        Returns:
            A 0-dim tensor.
        """
