"""Losses, figures and likelihoods that several problems share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from kronfac.likelihoods import Likelihood


def categorical() -> Likelihood:
    """Make the likelihood of `functional.cross_entropy`, averaged over examples.

    Returns:
        ``kronfac.Categorical()``.
    """
    from kronfac.likelihoods import Categorical

    return Categorical()


def bernoulli() -> Likelihood:
    """Make the likelihood of `pixel_loss`: summed over pixels, averaged over examples.

    Returns:
        ``kronfac.Bernoulli(reduction="batchmean")``.
    """
    from kronfac.likelihoods import Bernoulli

    return Bernoulli(reduction="batchmean")


def gaussian() -> Likelihood:
    """Make the likelihood of `half_squared_error`: summed over outputs, averaged over examples.

    Returns:
        ``kronfac.Gaussian(reduction="batchmean")``.
    """
    from kronfac.likelihoods import Gaussian

    return Gaussian(reduction="batchmean")


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared error, summed over outputs and averaged over examples.

    Args:
        outputs: ``[N, outputs]``.
        targets: Of the same shape.

    Returns:
        The loss, 0-dimensional.
    """
    return 0.5 * (outputs - targets).square().sum() / len(targets)


def real_squared_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error, summed over outputs and examples.

    Args:
        outputs: ``[N, outputs]``.
        targets: Of the same shape.

    Returns:
        The sum, 0-dimensional.
    """
    return (outputs - targets).square().sum()


def pixel_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of pixel intensities, summed over pixels and averaged over images.

    Args:
        outputs: Logits, ``[N, pixels]``.
        targets: Intensities in [0, 1], of the same shape.

    Returns:
        The loss, 0-dimensional.
    """
    return functional.binary_cross_entropy_with_logits(outputs, targets, reduction="sum") / len(targets)


def squared_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared reconstruction error, summed over pixels and images; pixels are in [0, 1].

    Args:
        outputs: Logits, ``[N, pixels]``.
        targets: Intensities in [0, 1], of the same shape.

    Returns:
        The sum, 0-dimensional.
    """
    return (outputs.sigmoid() - targets).square().sum()


def errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """Count the misclassified examples, in percent of one: averaging gives the error rate in percent.

    Args:
        outputs: Logits, ``[N, classes]``.
        targets: Class indices, ``[N]``.

    Returns:
        A hundred times the number of errors, 0-dimensional.
    """
    return 100.0 * (outputs.argmax(1) != targets).sum().to(torch.float64)
