"""Schedules of the learning rate, as factors of the first one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """How the learning rate falls.

    Attributes:
        kind: ``"constant"``; ``"cosine"`` or ``"exponential"``, over the budget; ``"step"``, at stated epochs.
        final: The factor at the end of the budget, of the two that fall over it.
        drop: What each step multiplies by.
        drop_epochs: Epochs between steps.
    """

    kind: str
    final: float
    drop: float
    drop_epochs: float

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Schedule:
        """Take it out of a run's hyper-parameters.

        Args:
            values: A value for each of them.

        Returns:
            The schedule.
        """
        return cls(values["schedule"], values["final_lr"], values["lr_drop"], values["lr_drop_epochs"])

    def factor(self, progress: float, epoch: float) -> float:
        """Compute what the first learning rate is multiplied by.

        Args:
            progress: The fraction of the budget that is used, in [0, 1].
            epoch: Passes through the training set so far.

        Returns:
            The factor; 1 at the start.
        """
        return _KINDS[self.kind](self, progress, epoch)


def _constant(schedule: Schedule, progress: float, epoch: float) -> float:
    return 1.0


def _cosine(schedule: Schedule, progress: float, epoch: float) -> float:
    return schedule.final + (1.0 - schedule.final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _exponential(schedule: Schedule, progress: float, epoch: float) -> float:
    return schedule.final**progress if schedule.final > 0.0 else float(progress == 0.0)


def _step(schedule: Schedule, progress: float, epoch: float) -> float:
    return schedule.drop ** math.floor(epoch / schedule.drop_epochs)


_KINDS: dict[str, Callable[[Schedule, float, float], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "exponential": _exponential,
    "step": _step,
}
#: The names of all schedules.
KINDS = tuple(_KINDS)
