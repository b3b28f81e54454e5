"""The true Fisher by Monte Carlo: labels sampled from the model's own distribution."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kronfac.likelihoods import Likelihood
from kronfac.sources.base import Seed, Source


class Sampled(Source):
    """Unbiased for the Fisher of the per-example sum loss (Martens & Grosse 2015, section 5).

    Args:
        samples: Number of pulls ``k`` per forward pass.
        probe: ``"labels"`` draws labels; ``"root"`` pulls ``S ξ`` with Rademacher ``ξ`` and ``S Sᵀ`` the Hessian of the
            loss with respect to the outputs (``√p⊙ξ − p √pᵀξ`` for the categorical): same mean, and lower variance for
            Bernoulli and Gaussian losses and for confident classifiers (with few, equally likely classes about equal).

    Raises:
        ValueError: ``samples`` is no positive integer or ``probe`` unknown.
    """

    name = "sampled"

    def __init__(self, samples: int = 1, probe: str = "labels") -> None:
        if not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples={samples!r} must be a positive integer.")
        if probe not in ("labels", "root"):
            raise ValueError(f"probe={probe!r} is unknown; choose 'labels' or 'root'.")
        self.count = samples
        self.probe = probe

    def seeds(
        self, likelihood: Likelihood, outputs: Tensor, targets: object, generator: torch.Generator | None
    ) -> Iterator[Seed]:
        """Yield ``k`` seeds of weight ``1/k``.

        Args:
            likelihood: The loss.
            outputs: Detached outputs.
            targets: Targets, or None.
            generator: Draws the labels.

        Yields:
            Seeds.
        """
        draw = likelihood.sample_cotangents if self.probe == "labels" else likelihood.probe_cotangents
        for _ in range(self.count):
            yield Seed(draw(outputs, targets, generator), 1.0 / self.count)  # type: ignore[arg-type]


class RootProbe(Sampled):
    """:class:`Sampled` with ``probe="root"``, by a name of its own.

    Args:
        samples: Number of pulls per forward pass.
    """

    name = "root"

    def __init__(self, samples: int = 1) -> None:
        super().__init__(samples, "root")
