"""Gaussian likelihood of fixed variance: squared error."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kronfac.likelihoods.checks import Targets, check_positive, check_vector
from kronfac.likelihoods.elementwise import ElementwiseLikelihood


class Gaussian(ElementwiseLikelihood):
    """Targets are the outputs plus independent Gaussian noise.

    A term is ``(z - y)^2 / (2 variance)`` with Hessian ``1 / variance``. ``variance=0.5`` gives the squared error
    itself, and with ``reduction="mean"`` exactly `torch.nn.functional.mse_loss`.
    """

    def __init__(self, variance: float = 1.0, reduction: str = "batchmean") -> None:
        """Store the variance.

        Args:
            variance: Of the noise, the same for every output; positive.
            reduction: ``"mean"`` divides by the number of elements that are not masked, ``"batchmean"`` by the number
                of examples, ``"sum"`` by 1.
        """
        super().__init__(reduction)
        self.variance = check_positive("variance", variance)

    def nll(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Squared error over twice the variance; the constant is dropped.

        Args:
            outputs: Means, ``[B, ...]``.
            labels: Of the same shape.

        Returns:
            Of the same shape.
        """
        return (outputs - labels).square() / (2 * self.variance)

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Derivative of `nll`, ``(z - y) / variance``.

        Args:
            outputs: Means, ``[B, ...]``.
            labels: Of the same shape.

        Returns:
            Of the same shape.
        """
        return (outputs - labels) / self.variance

    def curvature(self, outputs: Tensor) -> Tensor:
        """Second derivative of `nll`, ``1 / variance``.

        Args:
            outputs: Means, ``[B, ...]``.

        Returns:
            Of the same shape.
        """
        return torch.full_like(outputs, 1 / self.variance)

    def sample_labels(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw targets around the outputs.

        Args:
            outputs: Means, ``[B, ...]``.
            generator: Source of randomness, on the outputs' device.

        Returns:
            Of the same shape.
        """
        noise = torch.empty_like(outputs).normal_(generator=generator)
        return outputs + noise * math.sqrt(self.variance)

    def target_cotangents(self, outputs: Tensor, targets: Targets) -> Tensor:
        """Gradient of the sum loss at the targets.

        Args:
            outputs: Means, ``[B, ...]``.
            targets: Of the same shape, or a pair with a mask.

        Returns:
            Of the same shape.
        """
        outputs, labels, mask = self._labelled(outputs.detach(), targets)
        scores = self.score(outputs, labels)
        return scores if mask is None else scores * mask

    def symmetric_kl(self, outputs: Tensor, other: Tensor, targets: Targets = None) -> Tensor:
        """Squared distance of the means over twice the variance (both divergences are equal).

        Args:
            outputs: Means, ``[B, ...]``.
            other: Means to compare with.
            targets: Only for a mask.

        Returns:
            0-dimensional, divided as the loss is.
        """
        check_vector(outputs, other)
        raised, _, _ = self.prepare(outputs, targets)
        return self.average(self.nll(raised, other.to(raised)), outputs, targets)

    def kl(self, outputs: Tensor, other: Tensor, targets: Targets = None) -> Tensor:
        """Squared distance of the means over twice the variance: that of `symmetric_kl`.

        Args:
            outputs: Means, ``[B, ...]``.
            other: Means to compare with.
            targets: Only for a mask.

        Returns:
            0-dimensional, divided as the loss is.
        """
        return self.symmetric_kl(outputs, other, targets)

    def label_atoms(self, outputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Two labels, one standard deviation to either side: the score is linear, so its second moment is exact.

        Args:
            outputs: Means, ``[B, ...]``.

        Yields:
            Probabilities and labels.
        """
        for sign in (-1, 1):
            yield torch.full_like(outputs, 0.5), outputs + sign * math.sqrt(self.variance)

    def __repr__(self) -> str:
        return f"Gaussian(variance={self.variance}, reduction={self.reduction!r})"
