"""The cotangents of the outputs that a source pulls back: drawn once for all checks, and checked themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronfac import reference
from kronfac.inspect.comparison import ratio
from kronfac.likelihoods import Likelihood
from kronfac.sources import Seed, Source

#: Draws of cotangents of the outputs, which need no pass through the model.
DRAWS = 400


@dataclass(frozen=True)
class SeedCheck:
    """The seeds of a source against the loss.

    Attributes:
        ratio: Their mean squared norm over the trace of the loss's Hessian in the outputs by autodiff; it must be 1.
        sampling: Standard deviation of that at the number of draws taken; 0 for an exact source.
    """

    ratio: float
    sampling: float


class Replay(Source):
    """Yields given seeds.

    Args:
        seeds: The seeds.
    """

    name = "replay"

    def __init__(self, seeds: list[Seed]) -> None:
        self._seeds = seeds

    def seeds(
        self, likelihood: Likelihood, outputs: Tensor, targets: object, generator: torch.Generator | None
    ) -> Iterator[Seed]:
        """Yield the seeds.

        Args:
            likelihood: Unused.
            outputs: Unused.
            targets: Unused.
            generator: Unused.

        Yields:
            Seeds.
        """
        yield from self._seeds


def draw(source: Source, likelihood: Likelihood, outputs: Tensor, targets: Any, seed: int) -> list[Seed]:
    """Draw a source's seeds.

    Args:
        source: The source.
        likelihood: The loss.
        outputs: Detached outputs.
        targets: Targets.
        seed: Of the generator.

    Returns:
        The seeds.
    """
    generator = torch.Generator(outputs.device).manual_seed(seed)
    with torch.no_grad():
        return list(source.seeds(likelihood, outputs, targets, generator))


def check(source: Source, likelihood: Likelihood, outputs: Tensor, targets: Any, seed: int) -> SeedCheck:
    """Compare the second moment of a source's seeds with the loss's Hessian in the outputs, by its trace.

    Args:
        source: The source.
        likelihood: The loss.
        outputs: Detached outputs.
        targets: Targets.
        seed: Of the generator.

    Returns:
        The comparison.
    """
    with torch.no_grad():
        roots = reference.per_example_roots(_Outputs(outputs), likelihood, (), targets, expected=True)
        denominator = float(likelihood.denominator(outputs, targets))
    exact = float(roots.double().square().sum()) * denominator
    if source.exact:
        return SeedCheck(ratio(_squares(draw(source, likelihood, outputs, targets, seed)), exact), 0.0)
    generator = torch.Generator(outputs.device).manual_seed(seed)
    with torch.no_grad():
        found = [_squares(list(source.seeds(likelihood, outputs, targets, generator))) for _ in range(DRAWS)]
    values = torch.tensor(found, dtype=torch.float64)
    spread = max(float(values.std()), _bound(likelihood, outputs, targets, exact))
    return SeedCheck(ratio(float(values.mean()), exact), ratio(spread / math.sqrt(DRAWS), exact) if exact else 0.0)


def _squares(seeds: list[Seed]) -> float:
    given = [(seed.weight, seed.cotangent) for seed in seeds if seed.cotangent is not None]
    return sum(weight * float(cotangent.double().square().sum()) for weight, cotangent in given)


def _bound(likelihood: Likelihood, outputs: Tensor, targets: Any, exact: float) -> float:
    """Bound of the standard deviation that rare labels, which the draws may have missed, can cause."""
    # With independent terms Var Σ|v|² <= Σ E|v|⁴ <= max|v|² Σ E|v|², and |v|² <= 2 max v_i² for labels that move
    # probability from one output to another.
    largest = 0.0
    with torch.no_grad():
        weights = likelihood.term_weights(outputs, targets)
        try:
            for _, labels in likelihood.label_atoms(outputs):
                largest = max(largest, float(likelihood.score(outputs, labels).double().square().max()))
        except (NotImplementedError, ValueError):  # labels that cannot be enumerated, or not without targets
            return 0.0
    return math.sqrt(2 * largest * (1.0 if weights is None else float(weights.max())) * exact)


class _Outputs(nn.Module):
    """A model whose parameters are its outputs: its Gauss-Newton matrix is the loss's Hessian in the outputs."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values.detach().clone())

    def forward(self) -> Tensor:
        return self.values
