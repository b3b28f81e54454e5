"""How far a sampled estimate is expected to lie from its expectation, measured by drawing again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from kronfac.curvature import BlockDiagonal
from kronfac.sources import Exact, Recursive, Sampled, Source

#: Independent draws, an even number; the standard deviations are known to about 1/√(2·16) = 18 %.
DRAWS = 16


@dataclass
class Spread:
    """How one layer's block varies around its expectation.

    Attributes:
        samples: Draws that the estimate in question is the mean of.
        traces: ``tr C`` of each draw.
        squares: ``½ |C - C'|²`` of each pair of draws: unbiased for ``E |C - E C|²``.
    """

    samples: int = 1
    traces: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)

    @property
    def trace(self) -> float:
        """Standard deviation of ``tr C`` for that many samples."""
        return _deviation(self.traces) / math.sqrt(self.samples)

    @property
    def norm(self) -> float:
        """Root of ``E |C - E C|²`` for that many samples."""
        return math.sqrt(sum(self.squares) / len(self.squares) / self.samples) if self.squares else 0.0


def measure(draw: Callable[[int], BlockDiagonal], samples: int) -> dict[str, Spread]:
    """Draw pairs of estimates and compare them; two are held at a time.

    Args:
        draw: Gives an independent estimate for each index.
        samples: Number of such draws that the estimate in question is the mean of.

    Returns:
        The spread of each layer.
    """
    spreads: dict[str, Spread] = {}
    for index in range(0, DRAWS, 2):
        pair = [draw(index).blocks, draw(index + 1).blocks]
        for name in pair[0]:
            first, second = (blocks[name].to(dtype=torch.float64) for blocks in pair)
            spread = spreads.setdefault(name, Spread(samples))
            spread.traces += [float(first.trace()), float(second.trace())]
            apart = first.frobenius_norm() ** 2 - 2 * first.inner(second) + second.frobenius_norm() ** 2
            spread.squares.append(max(0.0, float(apart)) / 2)
    return spreads


def _deviation(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def single(source: Source) -> Source:
    """Give the source with one sample, of which more are means; the recursive one starts from the exact one's columns.

    Args:
        source: The source.

    Returns:
        Its twin with one sample.
    """
    if isinstance(source, Recursive):
        return Exact()
    return Sampled(1, source.probe) if isinstance(source, Sampled) else source


def measure_spreads(
    curvature_from: Callable[[Source, int], BlockDiagonal], source: Source, seed: int, *, means: bool
) -> dict[str, Spread]:
    """Measure the spread of an estimate with as many samples as the source draws.

    Args:
        curvature_from: Estimates with a source and a seed.
        source: The source.
        seed: The estimate's own seed; others are used.
        means: Whether an estimate of many samples is the mean of those of one.

    Returns:
        The spread of each layer.
    """
    if not means:  # eigenvectors of few samples are not those of many: each draw takes as many
        return measure(lambda index: curvature_from(source, seed + 1 + index), 1)
    count = source.count if isinstance(source, Sampled) else 1
    return measure(lambda index: curvature_from(single(source), seed + 1 + index), count)
