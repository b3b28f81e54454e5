"""Strategies against forgetting by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from kronfac.approximations import APPROXIMATIONS
from kronfac.experiments.continual.memories import Centre, Memory, Options, Quadratic, Replay
from kronfac.experiments.continual.recalling import Recalling
from kronfac.experiments.continual.views import FixedView, LiveView, MergedView
from kronfac.experiments.errors import ExperimentError, UnknownNameError


@dataclass(frozen=True)
class Strategy:
    """A way to learn one task after the other.

    Attributes:
        name: What it is asked for by.
        title: Its name for people.
        description: One line for people.
        make: Makes an empty memory.
        strength: The default strength; None where there is no such setting.
    """

    name: str
    title: str
    description: str
    make: Callable[[Options], Memory]
    strength: float | None = None

    def checked(self, strength: object) -> float:
        """Read a strength.

        Args:
            strength: A number or a text; None for the default.

        Returns:
            The strength, 0 where the strategy has none.

        Raises:
            ExperimentError: If it is no number above 0, or the strategy has none.
        """
        if strength is None:
            return self.strength or 0.0
        if self.strength is None:
            raise ExperimentError(f"{self.name} has no strength")
        try:
            value = float(str(strength))
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise ExperimentError(f"{self.name}.strength must be a number above 0, got {strength!r}")
        return value


#: Strategies by name; every approximation of `kronfac.approximations` but `UNSAVED` is one as well.
STRATEGIES: dict[str, Strategy] = {
    s.name: s
    for s in (
        Strategy("finetune", "fine-tuning", "nothing is done", lambda _: Memory()),
        Strategy("joint", "joint", "trains on the data of all tasks so far", lambda _: Replay()),
        Strategy("l2", "L2 anchor", "squared distance from the newest optimum", Centre, 0.2),
        Strategy(
            "ewc", "EWC", "diagonal Fisher for each task, at its optimum", lambda o: Quadratic(o, "diagonal"), 10.0
        ),
        Strategy(
            "online-ewc",
            "online EWC",
            "sum of diagonal Fishers around the newest optimum",
            lambda o: Quadratic(o, "diagonal", online=True),
            30.0,
        ),
        Strategy(
            "kfac", "KFAC penalty", "Kronecker-factored Fisher for each task", lambda o: Quadratic(o, "kfac"), 30.0
        ),
        Strategy(
            "online-kfac",
            "online KFAC",
            "nearest Kronecker product to the sum, around the newest optimum",
            lambda o: Quadratic(o, "kfac", online=True, combine="nearest"),
            30.0,
        ),
        Strategy(
            "fixed-bn",
            "KFAC, batch norm fixed",
            "online KFAC; batch norm keeps the first task's statistics",
            lambda o: Quadratic(o, "kfac", online=True, combine="nearest", view=FixedView()),
            10.0,
        ),
        Strategy(
            "merged-kfac",
            "KFAC, batch norm merged",
            "online KFAC on weights merged with batch norm, which takes each task's statistics",
            lambda o: Quadratic(o, "kfac", online=True, combine="nearest", view=MergedView()),
            10.0,
        ),
        Strategy(
            "live-kfac",
            "KFAC, live batch norm merged",
            "online KFAC on weights merged with batch norm, which stays in train mode",
            lambda o: Quadratic(o, "kfac", online=True, combine="nearest", view=LiveView(coupled=False)),
            10.0,
        ),
        Strategy(
            "live-xkfac",
            "XK-FAC, live batch norm merged",
            "the same with the curvature that batch norm makes between examples",
            lambda o: Quadratic(o, "xkfac", online=True, combine="nearest", view=LiveView(coupled=True)),
            10.0,
        ),
        Strategy(
            "online-xkfac",
            "online XK-FAC",
            "online KFAC's with the curvature that batch norm makes between examples",
            lambda o: Quadratic(o, "xkfac", online=True, combine="nearest"),
            10.0,
        ),
        Strategy(
            "recalling-kfac",
            "KFAC, batch norm recalled",
            "online KFAC's; a task is tested with its own batch norm statistics, recomputed for the newest weights",
            lambda o: Recalling(o, "kfac"),
            10.0,
        ),
        Strategy(
            "recalling-xkfac",
            "XK-FAC, batch norm recalled",
            "the same with the curvature that batch norm makes between examples",
            lambda o: Recalling(o, "xkfac"),
            10.0,
        ),
        Strategy(
            "kkfac",
            "KK-FAC penalty",
            "XK-FAC with blocks between linear layers, for each task",
            lambda o: Quadratic(o, "kkfac"),
            10.0,
        ),
        Strategy(
            "online-kkfac",
            "online KK-FAC",
            "sum of KK-FACs around the newest optimum, each kept as it is",
            lambda o: Quadratic(o, "kkfac", online=True),
            10.0,
        ),
    )
}


#: Approximations that are no strategies: `kronfac.continual.save` refuses their penalties, and a run keeps its own.
UNSAVED = ("kfac_tridiagonal",)


def get_strategy(name: str) -> Strategy:
    """Find a strategy.

    Args:
        name: Its name, or that of an approximation.

    Returns:
        The strategy.

    Raises:
        UnknownNameError: If there is none of that name.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    if name in APPROXIMATIONS:
        return Strategy(name, f"{name} penalty", "a penalty for each task", lambda o: Quadratic(o, name), 30.0)
    others = [n for n in APPROXIMATIONS if n not in STRATEGIES and n not in UNSAVED]
    raise UnknownNameError("strategy", name, [*STRATEGIES, *others])
