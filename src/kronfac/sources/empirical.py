"""The *empirical* Fisher: gradients at the training targets.  It is not the Fisher (Kunstner et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kronfac.likelihoods import Likelihood
from kronfac.sources.base import Seed, Source


class Empirical(Source):
    """One pull at the training targets."""

    name = "empirical"
    exact = True
    needs_targets = True

    def check(self, model: nn.Module, couples: bool) -> None:
        """Refuse batch norm in train mode, where one pull mixes the examples' gradients.

        Args:
            model: The model.
            couples: Whether examples interact.

        Raises:
            ValueError: They do.
        """
        if couples:
            raise ValueError(
                'source="empirical" pulls all examples at once, which is wrong where batch norm in train mode couples '
                'them: call model.eval() first, or use source="sampled".'
            )

    def seeds(
        self, likelihood: Likelihood, outputs: Tensor, targets: object, generator: torch.Generator | None
    ) -> Iterator[Seed]:
        """Yield the gradient at the targets.

        Args:
            likelihood: The loss.
            outputs: Detached outputs.
            targets: Targets.
            generator: Unused.

        Yields:
            One seed.

        Raises:
            ValueError: There are no targets.
        """
        if targets is None:
            raise ValueError('source="empirical" needs the training targets; none were given.')
        yield Seed(likelihood.target_cotangents(outputs, targets), 1.0)  # type: ignore[arg-type]
