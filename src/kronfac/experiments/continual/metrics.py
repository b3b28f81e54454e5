"""What a run remembers, from its accuracy matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Metrics(NamedTuple):
    """Figures of one run; NaN where fewer than two tasks leave nothing to say.

    Attributes:
        average_accuracy: Mean over tasks at the end.
        backward_transfer: Mean over tasks but the last of accuracy at the end less that when the task was learned.
        forward_transfer: Mean over tasks but the first of accuracy just before the task less that of the initial
            network (Lopez-Paz & Ranzato 2017).
        forgetting: Mean over tasks but the last of the best accuracy before the end less that at the end (Chaudhry et
            al. 2018).
    """

    average_accuracy: float
    backward_transfer: float
    forward_transfer: float
    forgetting: float


def metrics_of(initial: Sequence[float], matrix: Sequence[Sequence[float]]) -> Metrics:
    """Compute the figures of a run.

    Args:
        initial: Accuracy on each task before any training.
        matrix: Row i: accuracy on each task after task i was learned.

    Returns:
        The figures.
    """
    tasks, last = len(matrix), matrix[-1]
    old = range(tasks - 1)
    return Metrics(
        average_accuracy=_mean(last),
        backward_transfer=_mean([last[j] - matrix[j][j] for j in old]),
        forward_transfer=_mean([matrix[j - 1][j] - initial[j] for j in range(1, tasks)]),
        forgetting=_mean([max(matrix[i][j] for i in old) - last[j] for j in old]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
