"""What a loss is: its terms, their weights and masks, and what their sum is divided by.

For outputs ``z`` of shape ``[B, ...]`` the loss is a weighted sum of *terms* (one for each example, position or
element), over the *denominator* ``D``. Nobody outside of this package divides by a count of terms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from kronfac.likelihoods.checks import (
    Targets,
    check_finite,
    check_mask,
    check_outputs,
    check_real,
    check_reduction,
    check_terms,
    multiply,
    split_targets,
    spread,
)


class TermLoss(ABC):
    """A loss that is a weighted sum of terms; `Likelihood` adds the curvature.

    Attributes:
        reduction: ``"mean"`` divides as torch's loss of that name does, ``"batchmean"`` by the batch size,
            ``"sum"`` by 1.
        least_dims: The least number of dimensions of the outputs.
        filler: The label that stands for masked ones; any valid label.
    """

    least_dims: ClassVar[int] = 1
    filler: ClassVar[float] = 0.0

    def __init__(self, reduction: str = "batchmean") -> None:
        """Store the reduction.

        Args:
            reduction: ``"mean"``, ``"batchmean"`` or ``"sum"``.
        """
        self.reduction = check_reduction(reduction)

    @property
    def needs_targets(self) -> bool:
        """Whether the curvature depends on targets, by weights or ignored terms: then they must be passed."""
        return False

    @abstractmethod
    def nll(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Negative log-likelihood of each term, without any weights; constants may be dropped.

        Args:
            outputs: ``[B, ...]``, at least float32.
            labels: As `sample_labels` returns them.

        Returns:
            Shape ``[B, *T]`` of `term_shape`, differentiable in the outputs.
        """

    def term_shape(self, outputs: Tensor, targets: Targets = None) -> torch.Size:
        """Shape of the loss terms.

        Args:
            outputs: ``[B, ...]``.
            targets: Targets, where the shape depends on theirs.

        Returns:
            ``[B, *T]``; by default each output is a term.
        """
        return outputs.shape

    def check_labels(self, outputs: Tensor, labels: Tensor) -> None:
        """Refuse labels outside of the distribution's support; called by `validate`.

        Args:
            outputs: ``[B, ...]``.
            labels: Labels, `filler` where masked.
        """
        check_finite("targets", labels)

    def label_weights(self, outputs: Tensor, labels: Tensor | None) -> Tensor | None:
        """Weights of the terms, the mask apart.

        Args:
            outputs: ``[B, ...]``.
            labels: Labels, or None where not needed.

        Returns:
            Shape ``[B, *T]``, not negative; None means all ones.
        """
        return None

    def count_weights(self, outputs: Tensor, labels: Tensor | None) -> Tensor | None:
        """What each term adds to the denominator of ``"mean"``, the mask apart.

        Args:
            outputs: ``[B, ...]``.
            labels: Labels, or None where not needed.

        Returns:
            Shape ``[B, *T]``; None means all ones.
        """
        return None

    def over_outputs(self, terms: Tensor, outputs: Tensor) -> Tensor:
        """Broadcast a per-term tensor over the outputs of each term.

        Args:
            terms: ``[B, *T]``.
            outputs: ``[B, ...]``.

        Returns:
            A tensor that broadcasts with the outputs; by default terms are the outputs' leading dimensions.

        Raises:
            ValueError: If they are not.
        """
        try:
            return spread(terms, outputs.shape, "terms")
        except ValueError as error:
            name = type(self).__name__
            raise ValueError(
                f"the terms of {name}, of shape {tuple(terms.shape)}, are not along the leading dimensions of the "
                f"outputs, of shape {tuple(outputs.shape)}, so that a mask or weight cannot be brought to them: "
                f"implement {name}.over_outputs, which gives each output the figure of its term"
            ) from error

    def prepare(self, outputs: Tensor, targets: Targets) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Check shapes, raise the outputs to float32 at least and fill masked labels. Looks at no values.

        Args:
            outputs: ``[B, ...]``.
            targets: Targets, a pair with a mask, or None.

        Returns:
            Outputs, labels, and the mask as weights of shape ``[B, *T]``.

        Raises:
            ValueError: If targets are needed and missing.
        """
        check_outputs(outputs, self.least_dims)
        labels, mask = split_targets(targets)
        if labels is None and self.needs_targets:
            raise ValueError(f"the curvature of {self} depends on the targets: pass them with the outputs")
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if mask is not None:
            shape = self.term_shape(outputs, labels)
            mask = spread(check_real("mask", mask).detach().to(outputs), shape, "mask")
        if labels is not None:
            labels = self.fit_labels(outputs, labels)
            if mask is not None:
                keep = mask != 0
                if labels.shape != keep.shape:  # a number for each output of a term, or numbers of its own
                    keep = (
                        self.over_outputs(keep, outputs)
                        if labels.shape == outputs.shape
                        else spread(keep, labels.shape, "mask")
                    )
                labels = labels.masked_fill(~keep, self.filler)
        return outputs, labels, mask

    def fit_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Check the labels' shape and give them the dtype to compute with.

        Args:
            outputs: ``[B, ...]``, at least float32.
            labels: Targets as passed.

        Returns:
            The labels; by default of the outputs' dtype, and one for each term. Where a term has several outputs, its
            label may be of several numbers, in dimensions after the terms'.

        Raises:
            ValueError: If the shapes differ.
        """
        shape = self.term_shape(outputs, labels)
        several = shape != outputs.shape and labels.shape[: len(shape)] == shape
        if labels.shape != shape and not several:
            raise ValueError(
                f"targets of shape {tuple(labels.shape)} do not fit outputs of shape {tuple(outputs.shape)}: "
                f"{type(self).__name__} takes {tuple(shape)}"
            )
        return check_real("targets", labels).detach().to(outputs.dtype)

    def validate(self, outputs: Tensor, targets: Targets = None) -> None:
        """Look at every value of a batch, once, before it is used.

        Raises `TypeError` or `ValueError` for a wrong shape or dtype, NaN or Inf, a target out of range, a negative
        mask, or a batch of which no term counts under ``"mean"``.

        Args:
            outputs: ``[B, ...]``.
            targets: Targets, a pair with a mask, or None.

        Raises:
            ValueError: If no term counts.
        """
        outputs, labels, mask = self.prepare(outputs, targets)
        check_finite("outputs", outputs)
        if mask is not None:
            check_mask(mask)
        if labels is not None:
            self.check_labels(outputs, labels)
        if not self.denominator(outputs, targets) > 0:
            raise ValueError(
                f"no term of this batch of {len(outputs)} counts (all are masked, ignored or of weight 0), so that the "
                'mean is 0/0; reduction="sum" or "batchmean" allows such batches'
            )

    def term_weights(self, outputs: Tensor, targets: Targets = None) -> Tensor | None:
        """Weights ``c`` of the terms in the curvature: class weights, masks and ``pos_weight`` included.

        Args:
            outputs: ``[B, ...]``.
            targets: Targets, a pair with a mask, or None.

        Returns:
            Shape ``[B, *T]``, not negative; None means all ones.
        """
        outputs, labels, mask = self.prepare(outputs, targets)
        return multiply(self.label_weights(outputs, labels), mask)

    def row_weights(self, outputs: Tensor, targets: Targets = None) -> Tensor | None:
        """Weights of the examples and positions that a layer's inputs come from.

        Args:
            outputs: ``[B, ...]``.
            targets: Targets, a pair with a mask, or None.

        Returns:
            As `term_weights`, without what depends on which of two labels was seen (``pos_weight``).
        """
        return self.term_weights(outputs, targets)

    def denominator(self, outputs: Tensor, targets: Targets = None) -> Tensor:
        """What the sum of terms is divided by.

        Args:
            outputs: ``[B, ...]``.
            targets: Targets, a pair with a mask, or None.

        Returns:
            0-dimensional, of the outputs' dtype (at least float32); 0 if every term is ignored under ``"mean"``.
        """
        outputs, labels, mask = self.prepare(outputs, targets)
        if self.reduction == "sum":
            return outputs.new_tensor(1.0)
        if self.reduction == "batchmean":
            return outputs.new_tensor(len(outputs))
        counts = multiply(self.count_weights(outputs, labels), mask)
        if counts is None:
            return outputs.new_tensor(self.term_shape(outputs, labels).numel())
        return counts.sum()

    def sum_loss(self, outputs: Tensor, targets: Targets) -> Tensor:
        """Weighted sum of all terms.

        Args:
            outputs: ``[B, ...]``.
            targets: Targets, or a pair with a mask.

        Returns:
            0-dimensional, differentiable in the outputs.
        """
        return self.weighted_terms(*self._labelled(outputs, targets)).sum()

    def weighted_terms(self, outputs: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        """Terms of the loss that is minimised, weights and smoothing included.

        Args:
            outputs: ``[B, ...]``, prepared.
            labels: Labels, prepared.
            mask: Mask, prepared.

        Returns:
            Shape ``[B, *T]``.
        """
        terms = check_terms(self, self.nll(outputs, labels), self.term_shape(outputs, labels))
        weights = multiply(self.label_weights(outputs, labels), mask)
        return terms if weights is None else terms * weights

    def loss(self, outputs: Tensor, targets: Targets) -> Tensor:
        """The loss: `sum_loss` over `denominator`, and torch's loss of that name where there is one.

        Args:
            outputs: ``[B, ...]``.
            targets: Targets, or a pair with a mask.

        Returns:
            0-dimensional, differentiable in the outputs.
        """
        return self.sum_loss(outputs, targets) / self.denominator(outputs, targets)

    def average(self, terms: Tensor, outputs: Tensor, targets: Targets) -> Tensor:
        """Add per-term figures up as the loss adds its terms.

        Args:
            terms: ``[B, *T]``.
            outputs: ``[B, ...]``.
            targets: Targets, needed for their weights only.

        Returns:
            Weighted sum over `denominator`, 0-dimensional.
        """
        weights = self.term_weights(outputs, targets)
        total = terms.sum() if weights is None else (terms * weights).sum()
        return total / self.denominator(outputs, targets)

    def _labelled(self, outputs: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor | None]:
        """Prepare outputs and targets that cannot be missing."""
        outputs, labels, mask = self.prepare(outputs, targets)
        if labels is None:
            raise ValueError(f"the loss of {type(self).__name__} needs targets, got None")
        return outputs, labels, mask

    def __repr__(self) -> str:
        return f"{type(self).__name__}(reduction={self.reduction!r})"
