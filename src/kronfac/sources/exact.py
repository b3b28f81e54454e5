"""The exact Gauss-Newton: every column of a root of the loss's Hessian (KFLR, Botev et al. 2017, appendix A)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kronfac.likelihoods import Likelihood
from kronfac.sources.base import Seed, Source


class Exact(Source):
    """One pull per output of an example: exact, and as dear as there are outputs."""

    name = "exact"
    exact = True

    def check(self, model: nn.Module, couples: bool) -> None:
        """Refuse batch norm in train mode: columns pulled for all examples at once would mix them.

        Args:
            model: The model.
            couples: Whether examples interact.

        Raises:
            ValueError: They do.
        """
        if couples:
            raise ValueError(
                'source="exact" pulls all examples at once, which is wrong where batch norm in train mode couples '
                'them: call model.eval() first, or use source="sampled", whose independent labels keep them apart.'
            )

    def seeds(
        self, likelihood: Likelihood, outputs: Tensor, targets: object, generator: torch.Generator | None
    ) -> Iterator[Seed]:
        """Yield the columns of the root, each of weight one.

        Args:
            likelihood: The loss.
            outputs: Detached outputs.
            targets: Targets, or None.
            generator: Unused.

        Yields:
            Seeds.
        """
        for column in likelihood.root_columns(outputs, targets):  # type: ignore[arg-type]
            yield Seed(column, 1.0)
