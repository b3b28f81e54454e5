"""Cross-entropy of logits with all that torch's has: the loss of `Categorical`, and its gradient in the outputs."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kronfac.likelihoods.base import Likelihood
from kronfac.likelihoods.checks import Targets, check_finite, check_weight, multiply, split_targets
from kronfac.likelihoods.classes import dimension_of, without

# Probabilities that were mixed or rounded may exceed 1 by a little.
_SLACK = 1e-4


class CrossEntropy(Likelihood):
    """Terms, weights and targets of the cross-entropy; `Categorical` adds samples and roots."""

    least_dims: ClassVar[int] = 2

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        class_dim: int | None = None,
    ) -> None:
        """Store the options.

        Args:
            weight: Class weights, shape ``[C]``.
            ignore_index: Class index that marks terms to leave out. None: none is, and a negative
                target is an error.
            label_smoothing: In [0, 1]: the share of the target that is spread over all classes.
            reduction: ``"mean"`` divides by the class weights of the targets (their number without weights), or for
                probabilities by the number of terms; masks count in both. ``"batchmean"`` divides by the number of
                examples, ``"sum"`` by 1.
            class_dim: 1 (torch's place) or -1 (as language models have it). None: the only place for two-dimensional
                outputs, and for more dimensions whichever fits the shape of the targets, an error if both do.

        Raises:
            TypeError: If an option is of the wrong type.
            ValueError: If an option is out of range.
        """
        super().__init__(reduction)
        self.weight = check_weight("weight", weight)
        if self.weight is not None and self.weight.ndim != 1:
            raise ValueError(f"weight must have shape [C], got {tuple(self.weight.shape)}")
        if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, int)):
            raise TypeError(f"ignore_index must be an integer or None, got {ignore_index!r}")
        if isinstance(label_smoothing, bool | str) or not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")
        if class_dim not in (None, 1, -1) or isinstance(class_dim, bool | float):
            raise ValueError(f"class_dim must be None, 1 or -1, got {class_dim!r}")
        self.ignore_index = ignore_index
        self.label_smoothing = float(label_smoothing)
        self.class_dim = class_dim

    @property
    def needs_targets(self) -> bool:
        """Whether there are class weights or an ignored index."""
        return self.weight is not None or self.ignore_index is not None

    def term_shape(self, outputs: Tensor, targets: Targets = None) -> torch.Size:
        """Shape of the outputs without the classes.

        Args:
            outputs: Logits, ``[B, C, *T]`` or ``[B, *T, C]``.
            targets: Targets, where the place of the classes must be inferred.

        Returns:
            ``[B, *T]``.
        """
        return without(outputs.shape, self._dim(outputs, split_targets(targets)[0]))

    def over_outputs(self, terms: Tensor, outputs: Tensor) -> Tensor:
        """Give per-term figures a dimension for the classes.

        Args:
            terms: ``[B, *T]``.
            outputs: Logits.

        Returns:
            A tensor that broadcasts with the outputs.
        """
        return terms.unsqueeze(self._dim(outputs, terms))

    def fit_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Check shape and dtype of the targets.

        Args:
            outputs: Logits.
            labels: Class indices ``[B, *T]`` or probabilities of the outputs' shape.

        Returns:
            Indices as int64, or probabilities in the outputs' dtype.

        Raises:
            TypeError: If the targets are boolean or complex.
            ValueError: If the shapes do not fit, or torch would refuse ``ignore_index`` too.
        """
        dim = self._dim(outputs, labels)
        shape, kind = (without(outputs.shape, dim), "class indices")
        if labels.is_floating_point():
            shape, kind = outputs.shape, "probabilities"
            if self.ignore_index is not None and self.ignore_index >= 0:
                raise ValueError(f"ignore_index={self.ignore_index} has no meaning for targets that are probabilities")
        elif labels.dtype == torch.bool or labels.is_complex():
            raise TypeError(f"targets must be integers (class indices) or floating point, got {labels.dtype}")
        if labels.shape != shape:
            raise ValueError(
                f"targets of dtype {labels.dtype} are {kind} and must have shape {tuple(shape)} for outputs of shape "
                f"{tuple(outputs.shape)}, got {tuple(labels.shape)}"
            )
        return labels.detach().to(outputs.dtype if labels.is_floating_point() else torch.int64)

    def check_labels(self, outputs: Tensor, labels: Tensor) -> None:
        """Refuse indices that are no class, and probabilities out of range.

        Args:
            outputs: Logits.
            labels: Targets, prepared.

        Raises:
            ValueError: If a target is out of range.
        """
        if labels.is_floating_point():
            check_finite("targets", labels)
            wrong = (labels < 0) | (labels > 1 + _SLACK)
            if wrong.any():
                raise ValueError(f"targets must be probabilities in [0, 1], got {labels[wrong][0].item():g}")
            return
        classes = outputs.shape[self._dim(outputs, labels)]
        wrong = (labels < 0) | (labels >= classes)
        if self.ignore_index is not None:
            wrong &= labels != self.ignore_index
        if wrong.any():
            first = labels[wrong][0].item()
            advice = f"; if it marks targets to ignore, pass ignore_index={first}" if first < 0 else ""
            raise ValueError(
                f"targets must be class indices from 0 to {classes - 1} for outputs of shape {tuple(outputs.shape)}, "
                f"got {first}{advice}"
            )

    def nll(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy without weights or smoothing.

        Args:
            outputs: Logits.
            labels: Class indices or probabilities.

        Returns:
            ``[B, *T]``.
        """
        dim = self._dim(outputs, labels)
        log_probabilities = outputs.log_softmax(dim)
        if labels.is_floating_point():
            return -(labels * log_probabilities).sum(dim)
        return -log_probabilities.gather(dim, labels.unsqueeze(dim)).squeeze(dim)

    def weighted_terms(self, outputs: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        """Cross-entropy with weights and smoothing.

        Args:
            outputs: Logits, prepared.
            labels: Targets, prepared.
            mask: Mask, prepared.

        Returns:
            ``[B, *T]``.
        """
        dim = self._dim(outputs, labels)
        if labels.is_floating_point():
            terms = -(self._soft(outputs, labels, dim) * outputs.log_softmax(dim)).sum(dim)
            return terms if mask is None else terms * mask
        # Gathering, rather than a dense target, saves a tensor of the logits' size.
        terms = self.nll(outputs, self._safe(labels))
        if self.weight is not None:
            terms = terms * self._class_weight(outputs)[self._safe(labels)]
        if self.label_smoothing:
            smooth = self._soft(outputs, torch.zeros_like(outputs), dim)
            terms = (1 - self.label_smoothing) * terms - (smooth * outputs.log_softmax(dim)).sum(dim)
        weights = multiply(self._valid(outputs, labels), mask)
        return terms if weights is None else terms * weights

    def label_weights(self, outputs: Tensor, labels: Tensor | None) -> Tensor | None:
        """Sum ``c`` of each term's weighted and smoothed target vector.

        Args:
            outputs: Logits.
            labels: Targets, or None where not needed.

        Returns:
            ``[B, *T]``, or None.
        """
        if labels is None:
            return None
        dim = self._dim(outputs, labels)
        if labels.is_floating_point():
            return self._soft(outputs, labels, dim).sum(dim)
        valid = self._valid(outputs, labels)
        if self.weight is None:
            return valid
        weight = self._class_weight(outputs)
        smoothed = (1 - self.label_smoothing) * weight + self.label_smoothing * weight.mean()
        return multiply(smoothed[self._safe(labels)], valid)

    def count_weights(self, outputs: Tensor, labels: Tensor | None) -> Tensor | None:
        """What torch's mean counts: class weights of the targets, or each term for probabilities.

        Args:
            outputs: Logits.
            labels: Targets, or None where not needed.

        Returns:
            ``[B, *T]``, or None.
        """
        if labels is None or labels.is_floating_point():
            return None
        weight = None if self.weight is None else self._class_weight(outputs)[self._safe(labels)]
        return multiply(weight, self._valid(outputs, labels))

    def target_cotangents(self, outputs: Tensor, targets: Targets) -> Tensor:
        """``c p - t`` with the weighted and smoothed target vector ``t`` of each term.

        Args:
            outputs: Logits.
            targets: Targets, or a pair with a mask.

        Returns:
            Of the outputs' shape.
        """
        outputs, labels, mask = self._labelled(outputs.detach(), targets)
        dim = self._dim(outputs, labels)
        if not labels.is_floating_point():
            valid = self._valid(outputs, labels)
            hot = torch.zeros_like(outputs).scatter_(dim, self._safe(labels).unsqueeze(dim), 1.0)
            soft = self._soft(outputs, hot, dim)
            soft = soft if valid is None else soft * valid.unsqueeze(dim)
        else:
            soft = self._soft(outputs, labels, dim)
        gradient = outputs.softmax(dim) * soft.sum(dim, keepdim=True) - soft
        return gradient if mask is None else gradient * mask.unsqueeze(dim)

    def _dim(self, outputs: Tensor, labels: Tensor | None) -> int:
        """Place of the classes, not negative."""
        return dimension_of(outputs, labels, self.class_dim, self.weight)

    def _class_weight(self, outputs: Tensor) -> Tensor:
        assert self.weight is not None
        return self.weight.to(outputs)

    def _valid(self, outputs: Tensor, labels: Tensor) -> Tensor | None:
        """1 where a class index is not ignored; None if none can be."""
        return None if self.ignore_index is None else (labels != self.ignore_index).to(outputs.dtype)

    def _safe(self, labels: Tensor) -> Tensor:
        """Class indices with some class in place of ignored ones, to index with."""
        return labels if self.ignore_index is None else labels.masked_fill(labels == self.ignore_index, 0)

    def _soft(self, outputs: Tensor, probabilities: Tensor, dim: int) -> Tensor:
        """Weighted and smoothed target vectors."""
        classes = outputs.shape[dim]
        if self.label_smoothing:
            probabilities = (1 - self.label_smoothing) * probabilities + self.label_smoothing / classes
        if self.weight is None:
            return probabilities
        return (probabilities.movedim(dim, -1) * self._class_weight(outputs)).movedim(-1, dim)

    def __repr__(self) -> str:
        parts = []
        if self.weight is not None:
            parts.append(f"weight of {len(self.weight)} classes")
        if self.ignore_index is not None:
            parts.append(f"ignore_index={self.ignore_index}")
        if self.label_smoothing:
            parts.append(f"label_smoothing={self.label_smoothing}")
        if self.class_dim is not None:
            parts.append(f"class_dim={self.class_dim}")
        return f"Categorical({', '.join([*parts, f'reduction={self.reduction!r}'])})"
