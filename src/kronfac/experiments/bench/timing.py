"""Clocks, and summaries of what they gave."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

Clock = Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over rounds.

    Attributes:
        median: The median.
        low: The lower quartile.
        high: The upper quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Summarise values.

        Args:
            values: One for each round.

        Returns:
            Their quartiles.
        """
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(middle, low, high)

    def as_dict(self) -> dict[str, float]:
        """Return the three numbers by name."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def clock_of(device: str, processor_time: bool = False) -> Clock:
    """Choose a clock.

    Args:
        device: Where the work is done; a GPU's is awaited before the clock is read.
        processor_time: Count what this process was given by the machine instead of the time that passed.

    Returns:
        A function that gives seconds.
    """
    if device != "cuda":
        return time.process_time if processor_time else time.perf_counter

    def after_all_work() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return after_all_work


def timed(function: Callable[[], object], clock: Clock) -> float:
    """Measure one call.

    Args:
        function: What to call.
        clock: Gives seconds.

    Returns:
        Seconds.
    """
    start = clock()
    function()
    return clock() - start
