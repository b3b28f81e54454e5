"""Bernoulli likelihood: binary cross-entropy of logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from kronfac.likelihoods.checks import Targets, check_finite, check_vector, check_weight, multiply
from kronfac.likelihoods.elementwise import ElementwiseLikelihood
from kronfac.likelihoods.randomness import coin_tosses


class Bernoulli(ElementwiseLikelihood):
    """Each output is the logit of an independent coin; targets are in [0, 1].

    With ``reduction="mean"`` or ``"sum"`` the loss is exactly
    `torch.nn.functional.binary_cross_entropy_with_logits`. A term's Hessian is ``c p (1 - p)`` with
    ``c = weight * (1 + (pos_weight - 1) y)``, which depends on the target ``y`` where there is a ``pos_weight``.
    """

    def __init__(
        self, weight: Tensor | None = None, pos_weight: Tensor | None = None, reduction: str = "batchmean"
    ) -> None:
        """Store the weights.

        Args:
            weight: Of each term; broadcast to the outputs as torch does (trailing dimensions first).
            pos_weight: Of positive targets; broadcast to the outputs.
            reduction: ``"mean"`` divides by the number of elements that are not masked (their weights do not
                count, as in torch), ``"batchmean"`` by the number of examples, ``"sum"`` by 1.
        """
        super().__init__(reduction)
        self.weight = check_weight("weight", weight)
        self.pos_weight = check_weight("pos_weight", pos_weight)

    @property
    def needs_targets(self) -> bool:
        """Whether there is a ``pos_weight``."""
        return self.pos_weight is not None

    def check_labels(self, outputs: Tensor, labels: Tensor) -> None:
        """Refuse targets outside of [0, 1].

        Args:
            outputs: Logits, ``[B, ...]``.
            labels: Targets of the same shape.

        Raises:
            ValueError: If a target is no probability.
        """
        check_finite("targets", labels)
        wrong = (labels < 0) | (labels > 1)
        if wrong.any():
            raise ValueError(f"Bernoulli takes targets in [0, 1], got {labels[wrong][0].item():g}")

    def nll(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy without weights.

        Args:
            outputs: Logits, ``[B, ...]``.
            labels: In [0, 1], of the same shape.

        Returns:
            Of the same shape.
        """
        # Not by softplus, which is linear beyond its threshold: that leaves 2e-9, and no curvature at all.
        return -(labels * functional.logsigmoid(outputs) + (1 - labels) * functional.logsigmoid(-outputs))

    def weighted_terms(self, outputs: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        """Binary cross-entropy with weights: ``pos_weight`` scales the positive part only.

        Args:
            outputs: Logits, prepared.
            labels: Targets, prepared.
            mask: Mask, prepared.

        Returns:
            Of the outputs' shape.
        """
        terms = self.nll(outputs, labels)
        if self.pos_weight is not None:
            terms = terms - (self._pos_weight(outputs) - 1) * labels * functional.logsigmoid(outputs)
        weights = multiply(self._weight(outputs), mask)
        return terms if weights is None else terms * weights

    def label_weights(self, outputs: Tensor, labels: Tensor | None) -> Tensor | None:
        """Weight and ``pos_weight`` of each term.

        Args:
            outputs: Logits, ``[B, ...]``.
            labels: Targets, or None where not needed.

        Returns:
            Of the outputs' shape, or None.
        """
        weight = self._weight(outputs)
        if self.pos_weight is None or labels is None:
            return weight
        return multiply(weight, 1 + (self._pos_weight(outputs) - 1) * labels)

    def row_weights(self, outputs: Tensor, targets: Targets = None) -> Tensor | None:
        """Weight and mask of each term, without ``pos_weight``.

        Args:
            outputs: Logits, ``[B, ...]``.
            targets: Targets, a pair with a mask, or None.

        Returns:
            Of the outputs' shape, or None.
        """
        outputs, _, mask = self.prepare(outputs, targets)
        return multiply(self._weight(outputs), mask)

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Derivative of `nll`, ``p - y``.

        Args:
            outputs: Logits, ``[B, ...]``.
            labels: Of the same shape.

        Returns:
            Of the same shape.
        """
        return outputs.sigmoid() - labels

    def curvature(self, outputs: Tensor) -> Tensor:
        """Second derivative of `nll`, ``p (1 - p)``.

        Args:
            outputs: Logits, ``[B, ...]``.

        Returns:
            Of the same shape.
        """
        # 1 - sigmoid(z) would lose every digit of a confident prediction.
        return outputs.sigmoid() * (-outputs).sigmoid()

    def sample_labels(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Toss the coins.

        Args:
            outputs: Logits, ``[B, ...]``.
            generator: Source of randomness, on the outputs' device.

        Returns:
            Zeros and ones of the same shape.
        """
        return coin_tosses(outputs.sigmoid(), generator)

    def target_cotangents(self, outputs: Tensor, targets: Targets) -> Tensor:
        """Gradient of the sum loss at the targets.

        Args:
            outputs: Logits, ``[B, ...]``.
            targets: Of the same shape, or a pair with a mask.

        Returns:
            Of the same shape.
        """
        outputs, labels, mask = self._labelled(outputs.detach(), targets)
        scores = self.score(outputs, labels)
        if self.pos_weight is not None:
            scores = scores - (self._pos_weight(outputs) - 1) * labels * (-outputs).sigmoid()
        weights = multiply(self._weight(outputs), mask)
        return scores if weights is None else scores * weights

    def symmetric_kl(self, outputs: Tensor, other: Tensor, targets: Targets = None) -> Tensor:
        """Mean of both divergences, ``(p - q) (z - z') / 2`` for each term.

        Args:
            outputs: Logits, ``[B, ...]``.
            other: Logits to compare with.
            targets: Only for their weights.

        Returns:
            0-dimensional, divided as the loss is.
        """
        check_vector(outputs, other)
        first, _, _ = self.prepare(outputs, targets)
        # By the less likely of the coin's two sides: probabilities near 1 have lost their digits.
        side = torch.where(first > 0, -1.0, 1.0).to(first)
        first, second = side * first, side * other.to(first)
        return self.average((first.sigmoid() - second.sigmoid()) * (first - second) / 2, outputs, targets)

    def kl(self, outputs: Tensor, other: Tensor, targets: Targets = None) -> Tensor:
        """``p (z - z') + log(1 - p) - log(1 - q)`` for each term.

        Args:
            outputs: Logits, ``[B, ...]``.
            other: Logits to compare with.
            targets: Only for their weights.

        Returns:
            0-dimensional, divided as the loss is.
        """
        check_vector(outputs, other)
        first, _, _ = self.prepare(outputs, targets)
        # By the less likely of the coin's two sides: for the other one large logarithms would cancel.
        side = torch.where(first > 0, -1.0, 1.0).to(first)
        first, second = side * first, side * other.to(first)
        terms = first.sigmoid() * (first - second) + functional.logsigmoid(-first) - functional.logsigmoid(-second)
        return self.average(terms, outputs, targets)

    def label_atoms(self, outputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Both labels with their probabilities.

        Args:
            outputs: Logits, ``[B, ...]``.

        Yields:
            Probabilities and labels.
        """
        yield (-outputs).sigmoid(), torch.zeros_like(outputs)
        yield outputs.sigmoid(), torch.ones_like(outputs)

    def _weight(self, outputs: Tensor) -> Tensor | None:
        return None if self.weight is None else _broadcast("weight", self.weight, outputs)

    def _pos_weight(self, outputs: Tensor) -> Tensor:
        assert self.pos_weight is not None
        return _broadcast("pos_weight", self.pos_weight, outputs)

    def __repr__(self) -> str:
        parts = [
            f"{name} of shape {tuple(value.shape)}, "
            for name, value in (("weight", self.weight), ("pos_weight", self.pos_weight))
            if value is not None
        ]
        return f"Bernoulli({''.join(parts)}reduction={self.reduction!r})"


def _broadcast(name: str, weight: Tensor, outputs: Tensor) -> Tensor:
    """Broadcast a weight to the outputs, and never the outputs to a weight."""
    try:
        return weight.to(outputs).expand(outputs.shape)
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(weight.shape)} does not broadcast to outputs of shape {tuple(outputs.shape)}"
        ) from None
