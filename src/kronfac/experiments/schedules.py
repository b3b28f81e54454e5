"""Schedules of the learning rate, as factors of the first one."""

from __future__ import annotations

import math
from collections.abc import Callable


def _constant(progress: float, final: float) -> float:
    return 1.0


def _cosine(progress: float, final: float) -> float:
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _exponential(progress: float, final: float) -> float:
    return final**progress if final > 0.0 else float(progress == 0.0)


_SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "exponential": _exponential,
}


def factor(schedule: str, progress: float, final: float) -> float:
    """Compute what the learning rate is multiplied by.

    Args:
        schedule: ``"constant"``, ``"cosine"`` or ``"exponential"``.
        progress: The fraction of the budget that is used, in [0, 1].
        final: The factor at the end.

    Returns:
        The factor; 1 at the start.
    """
    return _SCHEDULES[schedule](progress, final)
