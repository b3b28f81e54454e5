"""Which dimension of logits holds the classes."""

from __future__ import annotations

import torch
from torch import Tensor


def dimension_of(outputs: Tensor, labels: Tensor | None, class_dim: int | None, weight: Tensor | None) -> int:
    """Find the dimension of the classes.

    Args:
        outputs: Logits, two dimensions or more.
        labels: Class indices, probabilities, or None.
        class_dim: What the user says, for more than two dimensions; None for what fits the labels.
        weight: Weights of the classes, or None.

    Returns:
        The dimension, not negative.

    Raises:
        ValueError: If both ends fit, or neither, or the classes are too few or not those of the weights.
    """
    dim = 1 if outputs.ndim == 2 else class_dim
    if dim is None:
        fits = [] if labels is None else [d for d in (1, -1) if without(outputs.shape, d) == labels.shape]
        if len(fits) != 1:
            known = "without targets" if labels is None else f"with targets of shape {tuple(labels.shape)}"
            raise ValueError(
                f"outputs of shape {tuple(outputs.shape)} {known} leave open which dimension holds the classes: "
                "pass class_dim=1 ([B, C, ...]) or class_dim=-1 ([B, ..., C])"
            )
        dim = fits[0]
    dim %= outputs.ndim
    classes = outputs.shape[dim]
    if classes < 2:
        raise ValueError(
            f"outputs of shape {tuple(outputs.shape)} have {classes} class in dimension {dim}: Categorical needs "
            "two or more; use Bernoulli for single logits"
        )
    if weight is not None and len(weight) != classes:
        raise ValueError(
            f"weight has {len(weight)} classes, outputs of shape {tuple(outputs.shape)} have {classes} "
            f"(dimension {dim})"
        )
    return dim


def without(shape: torch.Size, dim: int) -> torch.Size:
    """Drop one dimension of a shape.

    Args:
        shape: The shape.
        dim: Which one.

    Returns:
        The rest.
    """
    sizes = list(shape)
    del sizes[dim]
    return torch.Size(sizes)
