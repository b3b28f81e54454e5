"""The loss of several heads: their terms side by side, with what each counts in the sum; `Joint` adds the curvature."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kronfac.likelihoods.base import Likelihood
from kronfac.likelihoods.checks import Targets, check_real, split_targets, spread
from kronfac.likelihoods.heads import Head, make_heads


class Part(NamedTuple):
    """A head's part of a batch.

    Attributes:
        head: The head.
        likelihood: Its likelihood.
        outputs: ``[rows, width]``.
        labels: As the likelihood takes them, or None.
        mask: In the shape of its terms, or None.
        share: What its terms count in the sum.
    """

    head: Head
    likelihood: Likelihood
    outputs: Tensor
    labels: Tensor | None
    mask: Tensor | None
    share: float

    @property
    def targets(self) -> Targets:
        """Targets as a likelihood's methods take them."""
        return self.labels if self.mask is None else (self.labels, self.mask)


class JointLoss(Likelihood):
    """Terms, weights and targets of several heads along the last dimension of the outputs."""

    least_dims: ClassVar[int] = 2

    def __init__(self, *heads: tuple[Likelihood, int], weights: tuple[float, ...] | None = None) -> None:
        """Store the heads.

        Args:
            *heads: Likelihoods, each with the number of its outputs.
            weights: What their losses are multiplied by; ones by default.
        """
        self.heads = make_heads(heads, weights)
        super().__init__("sum" if self.heads[0].likelihood.reduction == "sum" else "batchmean")

    @property
    def needs_targets(self) -> bool:
        """Whether a head does."""
        return any(head.likelihood.needs_targets for head in self.heads)

    def targets(self, *labels: Tensor) -> Tensor:
        """Put the heads' targets together.

        Args:
            *labels: One tensor for each head, as its likelihood takes it; classes are indices.

        Returns:
            ``[B, *positions, labels]``, float32 at least: bfloat16 has no whole numbers beyond 256.

        Raises:
            ValueError: If their number or shapes do not fit.
        """
        if len(labels) != len(self.heads):
            raise ValueError(f"{self!r} has {len(self.heads)} heads, got {len(labels)} tensors of targets")
        columns = [head.pack(label) for head, label in zip(self.heads, labels, strict=True)]
        if len({column.shape[:-1] for column in columns}) > 1:
            raise ValueError(f"targets of shapes {[tuple(y.shape) for y in labels]} are not of the same examples")
        dtypes = [label.dtype for label in labels if label.is_floating_point()] or [torch.get_default_dtype()]
        wide = torch.promote_types(dtypes[0], torch.float32)
        return torch.cat([column.to(wide) for column in columns], -1)

    def term_shape(self, outputs: Tensor, targets: Targets = None) -> torch.Size:
        """Terms of all heads side by side.

        Args:
            outputs: ``[B, *positions, outputs]``.
            targets: Unused.

        Returns:
            ``[B, *positions, terms]``.
        """
        return torch.Size((*outputs.shape[:-1], sum(head.terms for head in self.heads)))

    def over_outputs(self, terms: Tensor, outputs: Tensor) -> Tensor:
        """Bring figures of terms to the outputs, head by head.

        Args:
            terms: ``[B, *positions, terms]``.
            outputs: ``[B, *positions, outputs]``.

        Returns:
            Of the outputs' shape.
        """
        parts = self._parts(outputs, None, spread(terms, self.term_shape(outputs), "terms"))
        return side_by_side(
            outputs,
            (p.likelihood.over_outputs(p.mask, p.outputs).expand_as(p.outputs) for p in parts if p.mask is not None),
        )

    def prepare(self, outputs: Tensor, targets: Targets) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Check shapes, and fill labels of which no term counts.

        Args:
            outputs: ``[B, *positions, outputs]``.
            targets: Targets, a pair with a mask, or None.

        Returns:
            Outputs, labels and mask.

        Raises:
            ValueError: If the outputs are not as many as the heads', or there is a mask and a head's own mean.
        """
        labels, mask = split_targets(targets)
        width = sum(head.width for head in self.heads)
        if isinstance(outputs, Tensor) and outputs.ndim > 1 and outputs.shape[-1] != width:
            raise ValueError(f"{self!r} takes {width} outputs along the last dimension, got {tuple(outputs.shape)}")
        outputs, labels, _ = super().prepare(outputs, labels)
        if mask is None:
            return outputs, labels, None
        if any(head.likelihood.reduction == "mean" for head in self.heads):
            raise ValueError(
                f"with a mask, what a mean divides by differs between the heads of {self!r}: give all of them "
                'reduction="batchmean"'
            )
        mask = spread(check_real("mask", mask).detach().to(outputs), self.term_shape(outputs), "mask")
        if labels is not None:
            split = mask.reshape(-1, mask.shape[-1]).split([head.terms for head in self.heads], -1)
            kept = side_by_side(outputs, (head.kept(m) for head, m in zip(self.heads, split, strict=True)))
            labels = labels.masked_fill(~kept, self.filler)
        return outputs, labels, mask

    def fit_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Check the columns of the targets.

        Args:
            outputs: ``[B, *positions, outputs]``.
            labels: Targets as `targets` puts them together.

        Returns:
            In the outputs' dtype.

        Raises:
            ValueError: If the shape does not fit.
        """
        shape = (*outputs.shape[:-1], sum(head.labels for head in self.heads))
        if labels.shape != shape:
            raise ValueError(
                f"targets of shape {tuple(labels.shape)} do not fit {self!r}, which takes {shape} here: its method "
                "targets() puts those of the heads together"
            )
        return check_real("targets", labels).detach().to(outputs.dtype)

    def check_labels(self, outputs: Tensor, labels: Tensor) -> None:
        """Refuse labels that a head does.

        Args:
            outputs: ``[B, *positions, outputs]``.
            labels: Targets, prepared.
        """
        super().check_labels(outputs, labels)
        columns = labels.reshape(-1, labels.shape[-1]).split([head.labels for head in self.heads], -1)
        for part, own in zip(self._parts(outputs), columns, strict=True):
            part.head.check(part.outputs, own)

    def nll(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Negative log-likelihoods of all heads.

        Args:
            outputs: ``[B, *positions, outputs]``.
            labels: Targets, prepared.

        Returns:
            ``[B, *positions, terms]``.
        """
        return side_by_side(outputs, (p.likelihood.nll(p.outputs, _given(p)) for p in self._parts(outputs, labels)))

    def weighted_terms(self, outputs: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        """Terms of the heads' losses, times what they count in the sum.

        Args:
            outputs: ``[B, *positions, outputs]``, prepared.
            labels: Targets, prepared.
            mask: Mask, prepared.

        Returns:
            ``[B, *positions, terms]``.
        """
        parts = self._parts(outputs, labels, mask)
        return side_by_side(
            outputs, (p.share * p.likelihood.weighted_terms(p.outputs, _given(p), p.mask) for p in parts)
        )

    def label_weights(self, outputs: Tensor, labels: Tensor | None) -> Tensor | None:
        """Weights of the heads' terms, times what they count in the sum.

        Args:
            outputs: ``[B, *positions, outputs]``.
            labels: Labels, or None where not needed.

        Returns:
            ``[B, *positions, terms]``, or None.
        """
        parts = list(self._parts(outputs, labels))
        found = [part.likelihood.label_weights(part.outputs, part.labels) for part in parts]
        return self._weights(outputs, parts, found, shares=True)

    def row_weights(self, outputs: Tensor, targets: Targets = None) -> Tensor | None:
        """Weights of the examples and positions, of which those of whole heads are none.

        Args:
            outputs: ``[B, *positions, outputs]``.
            targets: Targets, a pair with a mask, or None.

        Returns:
            ``[B, *positions, terms]``, or None.
        """
        parts = list(self._parts(*self.prepare(outputs, targets)))
        found = [part.likelihood.row_weights(part.outputs, part.targets) for part in parts]
        return self._weights(outputs, parts, found)

    def _weights(
        self, outputs: Tensor, parts: list[Part], found: list[Tensor | None], *, shares: bool = False
    ) -> Tensor | None:
        """Weights of the heads' terms side by side; None if all of them are ones."""
        factors = [part.share if shares else 1.0 for part in parts]
        if all(weights is None for weights in found) and set(factors) == {1.0}:
            return None
        wide = torch.promote_types(outputs.dtype, torch.float32)
        columns = []
        for part, factor, weights in zip(parts, factors, found, strict=True):
            shape = part.likelihood.term_shape(part.outputs)
            ones = torch.ones(shape, dtype=wide, device=outputs.device)
            columns.append(factor * (ones if weights is None else weights.to(wide)))
        return side_by_side(outputs, columns)

    def _parts(self, outputs: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Iterator[Part]:
        """The heads' parts of a batch whose targets are prepared."""
        positions = math.prod(outputs.shape[1:-1])
        at, label_at, term_at = 0, 0, 0
        for head in self.heads:
            z = outputs[..., at : at + head.width].reshape(-1, head.width)
            y = None if labels is None else labels[..., label_at : label_at + head.labels].reshape(-1, head.labels)
            m = None if mask is None else mask[..., term_at : term_at + head.terms]
            yield Part(
                head,
                head.likelihood,
                z,
                None if y is None else head.unpack(y),
                None if m is None else head.shaped(m, z),
                head.share(positions),
            )
            at, label_at, term_at = at + head.width, label_at + head.labels, term_at + head.terms

    def __repr__(self) -> str:
        heads = [f"({head.likelihood!r}, {head.width})" for head in self.heads]
        weights = tuple(head.weight for head in self.heads)
        return f"Joint({', '.join(heads)}{'' if set(weights) == {1.0} else f', weights={weights}'})"


def side_by_side(outputs: Tensor, figures: Iterable[Tensor]) -> Tensor:
    """Put what there is of each head's rows into columns.

    Args:
        outputs: ``[B, *positions, outputs]``.
        figures: For each head a tensor whose first dimension is the rows.

    Returns:
        ``[B, *positions, columns]``.
    """
    columns = torch.cat([figure.reshape(len(figure), -1) for figure in figures], -1)
    return columns.reshape(*outputs.shape[:-1], -1)


def _given(part: Part) -> Tensor:
    assert part.labels is not None
    return part.labels
