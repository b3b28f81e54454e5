"""One head of a joint likelihood: which outputs and labels are its own, and what its loss counts in the sum."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kronfac.likelihoods.base import Likelihood
from kronfac.likelihoods.checks import check_positive


@dataclass(frozen=True)
class Head:
    """A likelihood of some of the outputs of each row, where a row is an example, or a position of one.

    Attributes:
        likelihood: Of these outputs.
        width: How many outputs of a row they are.
        weight: What its loss is multiplied by in the sum over heads.
    """

    likelihood: Likelihood
    width: int
    weight: float

    @cached_property
    def _drawn(self) -> Tensor:
        """The label of one row, which says what labels are."""
        return self.likelihood.sample_labels(torch.zeros(1, self.width), torch.Generator().manual_seed(0))

    @cached_property
    def terms(self) -> int:
        """Terms of the loss in a row."""
        return self.likelihood.term_shape(torch.zeros(1, self.width), self._drawn).numel()

    @cached_property
    def labels(self) -> int:
        """Numbers that the label of a row is made of."""
        return self._drawn.numel()

    def pack(self, labels: Tensor) -> Tensor:
        """Put the numbers that labels are made of into columns.

        Args:
            labels: As the likelihood takes them, with any dimensions in front.

        Returns:
            ``[*dimensions, labels]``.

        Raises:
            ValueError: They are of another shape.
        """
        own = self._drawn.shape[1:]
        if labels.shape[labels.ndim - len(own) :] != own:
            raise ValueError(
                f"targets of {self.likelihood!r} must have {tuple(own)} as their last dimensions, got shape "
                f"{tuple(labels.shape)}"
            )
        return labels.reshape(*labels.shape[: labels.ndim - len(own)], -1)

    def unpack(self, columns: Tensor) -> Tensor:
        """Take labels out of their columns.

        Args:
            columns: ``[rows, labels]``, floating point.

        Returns:
            As the likelihood takes them, such as integers ``[rows]`` for classes.
        """
        shaped = columns.reshape(len(columns), *self._drawn.shape[1:])
        return shaped if self._drawn.is_floating_point() else shaped.to(self._drawn.dtype)

    def check(self, outputs: Tensor, columns: Tensor) -> None:
        """Refuse labels that the likelihood does, and numbers between two classes.

        Args:
            outputs: ``[rows, width]``.
            columns: ``[rows, labels]``, floating point.

        Raises:
            ValueError: There are some.
        """
        wrong = columns != columns.round()
        if not self._drawn.is_floating_point() and wrong.any():
            raise ValueError(f"{self.likelihood!r} takes whole numbers as targets, got {columns[wrong][0].item():g}")
        self.likelihood.check_labels(outputs, self.unpack(columns))

    def shaped(self, figures: Tensor, outputs: Tensor) -> Tensor:
        """Give figures of terms the shape that the likelihood has them in.

        Args:
            figures: ``[rows, terms]``.
            outputs: ``[rows, width]``.

        Returns:
            ``[rows]``, or with the terms of a row in dimensions of their own.
        """
        return figures.reshape(self.likelihood.term_shape(outputs, None))

    def kept(self, mask: Tensor) -> Tensor:
        """Tell which numbers of the labels count.

        Args:
            mask: ``[rows, terms]``.

        Returns:
            Boolean, ``[rows, labels]``: each by its term, or all of a row of which any term counts.
        """
        keep = mask != 0
        return keep if self.labels == self.terms else keep.any(-1, keepdim=True).expand(-1, self.labels)

    def share(self, positions: int) -> float:
        """What a term counts in a sum that is divided by the examples, or by nothing.

        Args:
            positions: Rows of an example.

        Returns:
            The head's weight, over the terms of an example where its own reduction divides by them.
        """
        return self.weight / (positions * self.terms) if self.likelihood.reduction == "mean" else self.weight


def make_heads(parts: tuple[tuple[Likelihood, int], ...], weights: tuple[float, ...] | None) -> tuple[Head, ...]:
    """Check what a joint likelihood is made of.

    Args:
        parts: Likelihoods with the numbers of their outputs.
        weights: Weights of their losses, or None for ones.

    Returns:
        The heads.

    Raises:
        TypeError: A part is no pair of a likelihood and an integer.
        ValueError: Numbers, weights or reductions do not fit.
    """
    if not parts:
        raise ValueError("Joint needs heads: pairs of a likelihood and the number of its outputs, (Categorical(), 4)")
    for part in parts:
        pair = isinstance(part, tuple | list) and len(part) == 2 and isinstance(part[0], Likelihood)
        if not pair or isinstance(part[1], bool) or not isinstance(part[1], int) or part[1] < 1:
            raise TypeError(f"a head is a pair of a likelihood and the number of its outputs, got {part!r}")
    factors = [1.0] * len(parts) if weights is None else [check_positive("a head's weight", w) for w in weights]
    if len(factors) != len(parts):
        raise ValueError(f"there are {len(parts)} heads and {len(factors)} weights: give one for each")
    sums = [likelihood.reduction == "sum" for likelihood, _ in parts]
    if any(sums) and not all(sums):
        raise ValueError('heads with reduction="sum" go with each other alone: the curvature has one denominator')
    for likelihood, _ in parts:
        if likelihood.needs_targets and likelihood.reduction == "mean":
            raise ValueError(
                f"{likelihood!r} divides by what its targets count, in which the other heads have no part: give it "
                'reduction="batchmean"'
            )
    return tuple(Head(likelihood, width, factor) for (likelihood, width), factor in zip(parts, factors, strict=True))
