"""Several independent predictions of one model: actor and critic, or the tasks of a network with several heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import zip_longest

import torch
from torch import Tensor

from kronfac.likelihoods.checks import Targets, check_generator, check_vector
from kronfac.likelihoods.joint_loss import JointLoss, Part, side_by_side


class Joint(JointLoss):
    """Heads side by side along the last dimension of the outputs; the loss is the weighted sum of their losses.

    An actor and a critic that share a trunk, with a coefficient of a half for the second loss:

        likelihood = Joint((Categorical(), 4), (Gaussian(), 1), weights=(1.0, 0.5))
        optimizer = KFAC(model, likelihood, lr=0.1, outputs=lambda out: torch.cat(out, -1))

    Labels of different heads are independent, so that the Fisher information is the sum of theirs. Each head divides
    as its own ``reduction`` says; where that is by what targets count, or there is a mask, it must be ``"batchmean"``.

    Targets are one tensor with what each head takes in its columns, as `targets` puts them together, and a mask has a
    column for each term: one for a class, one for each output of a Gaussian.
    """

    def sample_labels(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a label for each head.

        Args:
            outputs: ``[B, *positions, outputs]``.
            generator: Source of randomness, on the outputs' device.

        Returns:
            As `targets` puts them together.
        """
        wide = torch.promote_types(outputs.dtype, torch.float32)
        drawn = (part.likelihood.sample_labels(part.outputs, generator) for part in self._parts(outputs))
        return side_by_side(outputs, (labels.to(wide) for labels in drawn))

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Gradient of the sum of `nll` in the outputs.

        Args:
            outputs: ``[B, *positions, outputs]``.
            labels: As `sample_labels` returns them.

        Returns:
            Of the outputs' shape.
        """
        parts = self._parts(outputs, labels)
        return side_by_side(outputs, (p.likelihood.score(p.outputs, p.labels) for p in parts if p.labels is not None))

    def sample_cotangents(
        self, outputs: Tensor, targets: Targets = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The heads' own, times the root of what each counts.

        Args:
            outputs: ``[B, *positions, outputs]``.
            targets: Targets, needed for their weights only.
            generator: Source of randomness, on the outputs' device.

        Returns:
            Of the outputs' shape.
        """
        check_generator(generator, outputs)
        return self._rooted(outputs, targets, lambda p: p.likelihood.sample_cotangents(p.outputs, p.targets, generator))

    def probe_cotangents(
        self, outputs: Tensor, targets: Targets = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The heads' own, times the root of what each counts.

        Args:
            outputs: ``[B, *positions, outputs]``.
            targets: Targets, needed for their weights only.
            generator: Source of randomness, on the outputs' device.

        Returns:
            Of the outputs' shape.
        """
        check_generator(generator, outputs)
        return self._rooted(outputs, targets, lambda p: p.likelihood.probe_cotangents(p.outputs, p.targets, generator))

    def root_columns(self, outputs: Tensor, targets: Targets = None) -> Iterator[Tensor]:
        """The heads' own, one position of each example at a time.

        Args:
            outputs: ``[B, *positions, outputs]``.
            targets: Targets, needed for their weights only.

        Yields:
            Columns of the outputs' shape.
        """
        at = 0
        for part in self._given(outputs, targets):
            root = math.sqrt(part.share)
            for column in part.likelihood.root_columns(part.outputs, part.targets):
                own = root * column.reshape(len(outputs), -1, part.head.width)
                for position in range(own.shape[1]):
                    whole = own.new_zeros(len(outputs), own.shape[1], outputs.shape[-1])
                    whole[:, position, at : at + part.head.width] = own[:, position]
                    yield whole.reshape(outputs.shape)
            at += part.head.width

    def hessian_product(self, outputs: Tensor, vector: Tensor, targets: Targets = None) -> Tensor:
        """The heads' own, times what each counts.

        Args:
            outputs: ``[B, *positions, outputs]``.
            vector: Of the outputs' shape.
            targets: Targets; needed for their weights only, unless a head differentiates its loss.

        Returns:
            Of the outputs' shape.
        """
        check_vector(outputs, vector)
        widths = [head.width for head in self.heads]
        vectors = vector.reshape(-1, vector.shape[-1]).split(widths, -1)
        return side_by_side(
            outputs,
            [
                part.share * part.likelihood.hessian_product(part.outputs, own, part.targets)
                for part, own in zip(self._given(outputs, targets), vectors, strict=True)
            ],
        )

    def target_cotangents(self, outputs: Tensor, targets: Targets) -> Tensor:
        """The heads' own, times what each counts.

        Args:
            outputs: ``[B, *positions, outputs]``.
            targets: Targets, or a pair with a mask.

        Returns:
            Of the outputs' shape.
        """
        return side_by_side(
            outputs,
            (
                part.share * part.likelihood.target_cotangents(part.outputs, part.targets)
                for part in self._given(outputs, targets)
            ),
        )

    def symmetric_kl(self, outputs: Tensor, other: Tensor, targets: Targets = None) -> Tensor:
        """Sum of the heads' own.

        Args:
            outputs: ``[B, *positions, outputs]``.
            other: Outputs to compare with.
            targets: Targets, needed for their weights only.

        Returns:
            0-dimensional, divided as the loss is.
        """
        pairs = self._pairs(outputs, other, targets)
        return torch.stack([c * p.likelihood.symmetric_kl(p.outputs, z, p.targets) for p, z, c in pairs]).sum()

    def kl(self, outputs: Tensor, other: Tensor, targets: Targets = None) -> Tensor:
        """Sum of the heads' own.

        Args:
            outputs: ``[B, *positions, outputs]``.
            other: Outputs to compare with.
            targets: Targets, needed for their weights only.

        Returns:
            0-dimensional, divided as the loss is.
        """
        pairs = self._pairs(outputs, other, targets)
        return torch.stack([c * p.likelihood.kl(p.outputs, z, p.targets) for p, z, c in pairs]).sum()

    def label_atoms(self, outputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The heads' own side by side, which is enough since their terms are independent.

        Args:
            outputs: ``[B, *positions, outputs]``.

        Yields:
            Probabilities ``[B, *positions, terms]`` and labels; a head with fewer of them repeats one with none.
        """
        last: list[tuple[Tensor, Tensor]] = []
        for found in zip_longest(*(part.likelihood.label_atoms(part.outputs) for part in self._parts(outputs))):
            last = [(0 * last[i][0], last[i][1]) if atom is None else atom for i, atom in enumerate(found)]
            labels = side_by_side(outputs, (label.to(outputs.dtype) for _, label in last))
            yield side_by_side(outputs, (probabilities for probabilities, _ in last)), labels

    def _rooted(self, outputs: Tensor, targets: Targets, draw: Callable[[Part], Tensor]) -> Tensor:
        """What is drawn for each head, times the root of what it counts, since the second moment is what counts."""
        return side_by_side(outputs, (math.sqrt(part.share) * draw(part) for part in self._given(outputs, targets)))

    def _given(self, outputs: Tensor, targets: Targets) -> Iterator[Part]:
        return self._parts(*self.prepare(outputs.detach(), targets))

    def _pairs(self, outputs: Tensor, other: Tensor, targets: Targets) -> Iterator[tuple[Part, Tensor, float]]:
        """The heads' parts of two outputs, and what to multiply the divergence by that each divides itself."""
        check_vector(outputs, other)
        parts = self._parts(*self.prepare(outputs, targets))
        others = other.reshape(-1, other.shape[-1]).split([head.width for head in self.heads], -1)
        for part, z in zip(parts, others, strict=True):
            rows = len(z) / len(outputs) if part.likelihood.reduction == "batchmean" else 1.0
            yield part, z, part.head.weight * rows
