"""Checks of outputs, targets and masks that the likelihoods share."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

#: Targets of a batch: a tensor, a pair ``(targets, mask)``, or None where the curvature does not need them.
Targets: TypeAlias = Tensor | tuple[Tensor | None, Tensor] | list[Tensor | None] | None

REDUCTIONS = ("mean", "batchmean", "sum")


def check_reduction(reduction: str) -> str:
    """Refuse a reduction that does not give one number.

    Args:
        reduction: What was asked for.

    Returns:
        The same.

    Raises:
        ValueError: If it is unknown, or ``"none"``.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}: curvature belongs to one "
            "number, so terms must be added or averaged"
        )
    return reduction


def check_weight(name: str, weight: Tensor | None) -> Tensor | None:
    """Refuse weights under which the loss would have no positive semi-definite curvature.

    Args:
        name: What to call the weight.
        weight: The weights, or None.

    Returns:
        The weights, detached from any graph.

    Raises:
        TypeError: If they are no floating-point tensor.
        ValueError: If any is negative, NaN or infinite.
    """
    if weight is None:
        return None
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(weight).__name__}")
    if not weight.is_floating_point():
        raise TypeError(f"{name} must be of a floating-point dtype, got {weight.dtype}")
    wrong = ~torch.isfinite(weight) | (weight < 0)
    if wrong.any():
        raise ValueError(f"{name} must be finite and not negative, got {weight[wrong][0].item():g}")
    return weight.detach()


def check_positive(name: str, number: float) -> float:
    """Refuse anything but a positive, finite number.

    Args:
        name: What to call the number.
        number: The number.

    Returns:
        The same as a float.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not positive and finite.
    """
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"{name} must be a number, got {type(number).__name__}")
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be positive and finite, got {number}")
    return float(number)


def check_outputs(outputs: Tensor, dims: int) -> None:
    """Refuse outputs of the wrong kind. Looks at no value, and so never waits for a device.

    Args:
        outputs: The model's outputs.
        dims: The least number of dimensions.

    Raises:
        TypeError: If they are no floating-point tensor.
        ValueError: If dimensions are missing or empty.
    """
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"outputs must be a tensor, got {type(outputs).__name__}: pick the tensor that the loss is computed from"
        )
    if not outputs.is_floating_point():
        raise TypeError(f"outputs must be of a floating-point dtype, got {outputs.dtype}")
    if outputs.ndim < dims:
        wanted = "[B, ...]" if dims == 1 else "[B, C] or [B, C, ...]"
        raise ValueError(f"outputs must have shape {wanted}, batch first, got {tuple(outputs.shape)}")
    if outputs.numel() == 0:
        raise ValueError(f"outputs of shape {tuple(outputs.shape)} hold no element")


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity.

    Args:
        name: What to call the tensor.
        tensor: The tensor.

    Raises:
        ValueError: If an element is NaN or infinite.
    """
    finite = torch.isfinite(tensor)
    if not finite.all():
        wrong = tensor[~finite]
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} hold {wrong.numel()} NaN or Inf, first {wrong[0]}")


def check_real(name: str, tensor: Tensor) -> Tensor:
    """Refuse complex numbers, whose imaginary parts a cast would drop.

    Args:
        name: What to call the tensor.
        tensor: The tensor.

    Returns:
        The same.

    Raises:
        TypeError: If it is complex.
    """
    if tensor.is_complex():
        raise TypeError(f"{name} must be real numbers, got {tensor.dtype}")
    return tensor


def check_mask(mask: Tensor) -> None:
    """Refuse weights of terms that are negative, NaN or infinite.

    Args:
        mask: The weights.

    Raises:
        ValueError: If one is.
    """
    check_finite("mask weights", mask)
    if (mask < 0).any():
        raise ValueError(f"mask must not be negative, got {mask.min().item():g}")


def check_vector(outputs: Tensor, vector: Tensor) -> None:
    """Refuse a second tensor that is not of the outputs' shape.

    Args:
        outputs: ``[B, ...]``.
        vector: The other tensor.

    Raises:
        ValueError: If the shapes differ.
    """
    if vector.shape != outputs.shape:
        raise ValueError(f"expected a tensor of the outputs' shape {tuple(outputs.shape)}, got {tuple(vector.shape)}")


def check_generator(generator: torch.Generator | None, outputs: Tensor) -> None:
    """Refuse a generator that lives on another device than what it is to fill.

    Args:
        generator: The generator, or None for torch's own.
        outputs: The outputs.

    Raises:
        ValueError: If the devices differ.
    """
    if generator is not None and generator.device.type != outputs.device.type:
        raise ValueError(
            f"generator is on {generator.device} and outputs on {outputs.device}: make it with "
            f"torch.Generator(device={str(outputs.device)!r})"
        )


def split_targets(targets: Targets) -> tuple[Tensor | None, Tensor | None]:
    """Take a pair ``(targets, mask)`` apart; a list is what data loaders collate such pairs to.

    Args:
        targets: Targets in any accepted form.

    Returns:
        The labels and the mask, None where there is none.

    Raises:
        TypeError: If it is none of the accepted forms.
    """
    if targets is None or isinstance(targets, Tensor):
        return targets, None
    if isinstance(targets, tuple | list) and len(targets) == 2:
        labels, mask = targets
        if (labels is None or isinstance(labels, Tensor)) and isinstance(mask, Tensor):
            return labels, mask
    raise TypeError(f"targets must be a tensor or a pair (targets, mask) of tensors, got {type(targets).__name__}")


def spread(terms: Tensor, shape: torch.Size, name: str) -> Tensor:
    """Align the *leading* dimensions of a per-term tensor with a larger shape.

    Args:
        terms: Fewer dimensions than ``shape`` are allowed, and dimensions of size 1.
        shape: The shape to broadcast to.
        name: What to call the tensor.

    Returns:
        A view of shape ``shape``.

    Raises:
        ValueError: If the dimensions do not fit. Trailing dimensions are never matched with leading ones: a mask
            ``[B]`` for terms ``[B, B]`` means examples.
    """
    fits = terms.ndim <= len(shape) and all(a in (1, b) for a, b in zip(terms.shape, shape, strict=False))
    if not fits:
        raise ValueError(
            f"{name} of shape {tuple(terms.shape)} does not fit loss terms of shape {tuple(shape)} (its dimensions "
            "must equal the leading ones, or be 1)"
        )
    return terms.reshape(*terms.shape, *(1,) * (len(shape) - terms.ndim)).expand(shape)


def multiply(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Multiply two weights of which either may be None, meaning all ones.

    Args:
        first: Weights or None.
        second: Weights or None.

    Returns:
        The product, None when both are.
    """
    if first is None or second is None:
        return second if first is None else first
    return first * second


def check_terms(likelihood: object, terms: Tensor, shape: torch.Size) -> Tensor:
    """Refuse an ``nll`` that adds its terms up: each has its own label and weight.

    Args:
        likelihood: Whose it is.
        terms: What it returned.
        shape: What its ``term_shape`` says, ``[B, *T]``.

    Returns:
        The terms.

    Raises:
        ValueError: They are of another shape.
    """
    if terms.shape != shape:
        name = type(likelihood).__name__
        raise ValueError(
            f"{name}.nll must return a number for each term, here {tuple(shape)}, not a tensor of shape "
            f"{tuple(terms.shape)}: leave sum and mean out, or say by {name}.term_shape which outputs are one term"
        )
    return terms
