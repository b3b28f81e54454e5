"""What every curvature block and every inverse of one can do.

The parameters of one layer form a matrix ``V`` of shape ``[*stack, d_out, d_in]``: ``stack`` is ``()`` for most layers,
the groups of a grouped convolution, or the channels of a normalisation layer. A block is a symmetric positive
semi-definite matrix over ``vec(V)``, row-major, block diagonal over the stack. Wherever a ``V`` is taken, further
dimensions in front are a batch of vectors, and come back in front.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NoReturn, Self

import torch
from torch import Tensor

from kronfac.blocks.eigenbasis import Eigenbasis
from kronfac.blocks.shifts import Shift


class Block(ABC):
    """A symmetric positive semi-definite matrix over the parameters of one layer.

    Attributes:
        kind: The name under which blocks of this class are saved.
        shifts: The shifts that `factorise` supports.
        shape: ``[*stack, d_out, d_in]``, the shape of the vectors it acts on.
    """

    kind: ClassVar[str]
    shifts: ClassVar[tuple[type[Shift], ...]]
    shape: torch.Size

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Tensors that, with `shape`, define the block.

        Returns:
            Tensors by name; `from_tensors` takes them back.
        """

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: torch.Size) -> Self:
        """Rebuild a block from what `tensors` gave.

        Args:
            tensors: The tensors by name.
            shape: The block's shape.

        Returns:
            The block.
        """

    @abstractmethod
    def matmul(self, vector: Tensor) -> Tensor:
        """Multiply by a vector.

        Args:
            vector: ``V``, shape ``[..., *stack, d_out, d_in]``.

        Returns:
            ``C vec(V)`` in the shape of ``vector``.
        """

    @abstractmethod
    def trace(self) -> Tensor:
        """Trace.

        Returns:
            The sum of the diagonal, a 0-dim tensor.
        """

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Diagonal.

        Returns:
            The diagonal in the block's shape.
        """

    @abstractmethod
    def frobenius_norm(self) -> Tensor:
        """Frobenius norm.

        Returns:
            The root of the sum of squared entries, a 0-dim tensor.
        """

    @abstractmethod
    def matrices(self) -> Tensor:
        """One dense matrix for each stack element.

        Returns:
            Shape ``[*stack, n, n]`` with ``n = d_out * d_in``.
        """

    @abstractmethod
    def eigh(self) -> Eigenbasis:
        """Eigendecomposition.

        Returns:
            The eigenvalues, in the block's shape, with the maps into and out of the eigenbasis.
        """

    @abstractmethod
    def factorise(self, shift: Shift) -> Inverse:
        """Prepare to solve with the block after a shift is added.

        Args:
            shift: What is added; see `shifts` for what this block supports.

        Returns:
            The inverse.
        """

    @abstractmethod
    def scale(self, factor: Tensor | float) -> Self:
        """Multiply by a number.

        Args:
            factor: Not negative.

        Returns:
            A new block.
        """

    def quadratic_form(self, vector: Tensor) -> Tensor:
        """Quadratic form ``vec(V)^T C vec(V)``.

        Args:
            vector: ``V``, shape ``[..., *stack, d_out, d_in]``.

        Returns:
            A 0-dim tensor, or one entry per vector of a batch.
        """
        product = self.matmul(vector) * vector
        return product.flatten(-len(self.shape)).sum(-1)

    def inner(self, other: Block) -> Tensor:
        """Frobenius inner product ``tr(C^T D)`` with another block of the same shape.

        Uses the structure of the two where that is possible, and their dense matrices otherwise.

        Args:
            other: The other block.

        Returns:
            A 0-dim tensor.

        Raises:
            ValueError: If the shapes differ.
        """
        if self.shape != other.shape:
            raise ValueError(f"blocks of shapes {tuple(self.shape)} and {tuple(other.shape)} have no inner product")
        for left, right in ((self, other), (other, self)):
            product = left._structured_inner(right)
            if product is not None:
                return product
        return (self.matrices() * other.matrices()).sum()

    def _structured_inner(self, other: Block) -> Tensor | None:
        # The inner product with a block whose structure this class knows, or None.
        return None

    def factor_means(self) -> tuple[Tensor, Tensor] | None:
        """Mean eigenvalues of the input and the output factor, for rules that split the damping between the two.

        Returns:
            ``(tr A / d_in, tr G / d_out)``, each of shape ``[*stack]``, or None for a block that is no Kronecker
            product.
        """
        return None

    def to_dense(self) -> Tensor:
        """Dense matrix.

        Returns:
            Shape ``[P, P]`` over the row-major ``vec(V)``, ``P`` the number of entries of ``V``.
        """
        matrices = self.matrices()
        return torch.block_diag(*matrices.reshape(-1, *matrices.shape[-2:]))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Copy of the block on another device or in another dtype.

        Args:
            device: The device; the present one by default.
            dtype: float32 or float64; the present one by default.

        Returns:
            The block, sharing the tensors that need no conversion.
        """
        converted = {name: tensor.to(device=device, dtype=dtype) for name, tensor in self.tensors().items()}
        return self.from_tensors(converted, self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the block, float32 or float64."""
        return next(iter(self.tensors().values())).dtype

    @property
    def device(self) -> torch.device:
        """Device of the block."""
        return next(iter(self.tensors().values())).device

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype})"

    def _refuse(self, shift: Shift) -> NoReturn:
        accepted = ", ".join(kind.__name__ for kind in self.shifts)
        raise TypeError(
            f"a {type(self).__name__} block cannot be factorised with the shift {type(shift).__name__}; "
            f"it accepts {accepted}"
        )


class Inverse(ABC):
    """The inverse of a block with a shift added.

    Attributes:
        kind: The name under which inverses of this class are saved.
        shape: ``[*stack, d_out, d_in]``, the shape of the vectors it acts on.
    """

    kind: ClassVar[str]
    shape: torch.Size

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Tensors that, with `shape`, define the inverse.

        Returns:
            Tensors by name; `from_tensors` takes them back.
        """

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: torch.Size) -> Self:
        """Rebuild an inverse from what `tensors` gave.

        Args:
            tensors: The tensors by name.
            shape: The block's shape.

        Returns:
            The inverse.
        """

    @abstractmethod
    def apply(self, vector: Tensor) -> Tensor:
        """Solve.

        Args:
            vector: ``V``, shape ``[..., *stack, d_out, d_in]``.

        Returns:
            The inverse times ``vec(V)``, in the shape of ``vector``.
        """

    @abstractmethod
    def sqrt_apply(self, vector: Tensor) -> Tensor:
        """Multiply by a root ``S`` of the inverse, ``S S^T = inverse``; each class says which.

        White noise becomes noise whose covariance is the inverse.

        Args:
            vector: ``V``, shape ``[..., *stack, d_out, d_in]``.

        Returns:
            ``S vec(V)`` in the shape of ``vector``.
        """

    @abstractmethod
    def logdet(self) -> Tensor:
        """Log-determinant of the block with the shift added (not of its inverse).

        Returns:
            A 0-dim tensor.
        """
