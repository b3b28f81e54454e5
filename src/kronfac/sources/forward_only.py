"""No pull at all: the output factor is the identity (FOOF, Benzing 2022)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kronfac.likelihoods import Likelihood
from kronfac.sources.base import Seed, Source


class ForwardOnly(Source):
    """Inputs alone; approximations that need cotangents refuse it."""

    name = "forward_only"
    paired = False

    def seeds(
        self, likelihood: Likelihood, outputs: Tensor, targets: object, generator: torch.Generator | None
    ) -> Iterator[Seed]:
        """Yield one empty seed.

        Args:
            likelihood: Unused.
            outputs: Unused.
            targets: Unused.
            generator: Unused.

        Yields:
            One seed without cotangent.
        """
        yield Seed(None, 1.0)
