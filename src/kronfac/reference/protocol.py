"""What the oracle asks of a likelihood; `kronfac.Likelihood` has it all, but is not imported here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class OutputLoss(Protocol):
    """A loss with labels that can be drawn and enumerated."""

    @property
    def needs_targets(self) -> bool:
        """Whether the curvature depends on targets."""
        ...

    def nll(self, outputs: Tensor, labels: Tensor, /) -> Tensor:
        """Negative log-likelihood of each term, ``[B, *T]``, without weights."""
        ...

    def sum_loss(self, outputs: Tensor, targets: Any, /) -> Tensor:
        """Weighted sum of all terms."""
        ...

    def denominator(self, outputs: Tensor, targets: Any, /) -> Tensor:
        """What the loss divides the sum by."""
        ...

    def term_weights(self, outputs: Tensor, targets: Any, /) -> Tensor | None:
        """Weights of the terms in the curvature, ``[B, *T]``."""
        ...

    def validate(self, outputs: Tensor, targets: Any, /) -> None:
        """Refuse wrong outputs and targets."""
        ...

    def sample_labels(self, outputs: Tensor, generator: torch.Generator, /) -> Tensor:
        """Draw labels from the prediction."""
        ...

    def label_atoms(self, outputs: Tensor, /) -> Iterator[tuple[Tensor, Tensor]]:
        """Enumerate labels with their probabilities."""
        ...
