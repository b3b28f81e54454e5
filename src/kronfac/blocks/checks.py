"""Checks that the blocks share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

_PRECISIONS = (torch.float32, torch.float64)


def check_precision(name: str, tensor: Tensor) -> None:
    """Refuse anything below float32.

    Args:
        name: What to call the tensor.
        tensor: The tensor.

    Raises:
        TypeError: If it is no tensor, or neither float32 nor float64.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _PRECISIONS:
        raise TypeError(f"{name} must be float32 or float64, got {tensor.dtype}: convert it first")


def check_square(name: str, matrix: Tensor) -> None:
    """Refuse anything but square matrices, float32 or float64.

    Args:
        name: What to call the matrix.
        matrix: Shape ``[*stack, n, n]``.

    Raises:
        ValueError: If the last two dimensions differ.
    """
    check_precision(name, matrix)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"{name} must have shape [*stack, n, n], got {tuple(matrix.shape)}")


def check_pair(names: tuple[str, str], first: Tensor, second: Tensor) -> None:
    """Refuse two factors that differ in dtype or device.

    Args:
        names: What to call the two.
        first: A factor.
        second: The other factor.

    Raises:
        TypeError: If the dtypes differ.
        ValueError: If the devices differ.
    """
    if first.dtype != second.dtype:
        raise TypeError(f"{names[0]} is {first.dtype} and {names[1]} is {second.dtype}: they must agree")
    if first.device != second.device:
        raise ValueError(f"{names[0]} is on {first.device} and {names[1]} on {second.device}: they must agree")


def check_vector(vector: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    """Refuse a vector that the block cannot act on.

    Args:
        vector: The vector, further dimensions in front allowed.
        shape: The block's shape.
        dtype: The block's dtype.

    Raises:
        ValueError: If the last dimensions are not the block's shape.
        TypeError: If the dtypes differ.
    """
    if vector.shape[-len(shape) :] != shape:
        raise ValueError(f"the block acts on vectors of shape {tuple(shape)}, got {tuple(vector.shape)}")
    if vector.dtype != dtype:
        raise TypeError(f"the block is {dtype} and the vector {vector.dtype}: convert one of them")


def check_factor(factor: Tensor | float) -> None:
    """Refuse a scale that would make a block indefinite.

    Args:
        factor: The scale.

    Raises:
        ValueError: If it is negative, infinite, NaN or no scalar.
    """
    if isinstance(factor, Tensor) and factor.ndim:
        raise ValueError(f"a block is scaled by one number, got a tensor of shape {tuple(factor.shape)}")
    number = float(factor.detach() if isinstance(factor, Tensor) else factor)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"a block is scaled by a finite number that is not negative, got {number}")


def check_tensors(
    kind: str, tensors: Mapping[str, Tensor], names: Sequence[str], shape: Sequence[int], built: Sequence[int] | None
) -> None:
    """Refuse tensors that do not make a block of the shape they claim.

    Args:
        kind: The block's kind.
        tensors: The tensors by name.
        names: The names that the kind needs.
        shape: The shape that is claimed.
        built: The shape that the tensors imply, or None when that is not known yet.

    Raises:
        ValueError: If names are missing or unknown, or the shapes differ.
    """
    if set(tensors) != set(names):
        raise ValueError(f"a block of kind {kind!r} is made of the tensors {sorted(names)}, got {sorted(tensors)}")
    if built is not None and tuple(built) != tuple(shape):
        raise ValueError(f"the tensors of this block of kind {kind!r} make shape {tuple(built)}, not {tuple(shape)}")


class _WithTensors(Protocol):
    def tensors(self) -> dict[str, Tensor]: ...


def check_gradients(name: str, block: _WithTensors, inverse: _WithTensors | None) -> None:
    """Refuse to invert what depends on tensors that require gradients, where those would be lost without a word.

    Args:
        name: What is inverted.
        block: The block.
        inverse: Its inverse; None for one that keeps no gradients.

    Raises:
        TypeError: If a gradient is wanted, and lost.
    """
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in block.tensors().values()):
        return
    if inverse is None or not any(t.requires_grad for t in inverse.tensors().values()):
        raise TypeError(
            f"{name} depends on a tensor that requires a gradient (was it scaled by one?), but its inverse is no "
            "function of it that autograd could follow: scale by a plain number, or factorise under torch.no_grad()"
        )
