"""Hyper-parameters chosen by the newest task alone, and how far that says anything about all tasks.

A learner that has moved on has no data of earlier tasks to choose by (Lee et al. 2020, A.6). The *target accuracy* is
that of each task but the first, right after it was learned, on training examples that were held out.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kronfac.experiments.continual.compare import describe
from kronfac.experiments.continual.metrics import metrics_of
from kronfac.experiments.continual.plans import Budget, carry_out, plans_of
from kronfac.experiments.continual.runner import Listener
from kronfac.experiments.continual.strategies import BALANCES, get_strategy
from kronfac.experiments.errors import ExperimentError, need
from kronfac.experiments.files import write_text
from kronfac.experiments.pictures import save_figure
from kronfac.experiments.present import Table, number

SCATTER, POINTS = "target-against-average.png", "grid.jsonl"
AXES = ("lr", "damping", "strength")


class Point(NamedTuple):
    """A run of the grid.

    Attributes:
        strategy: Name of the strategy.
        balance: How the penalty was weighed; ``"none"`` without penalty.
        settings: All settings of the run.
        target: Target accuracy, from 0 to 1.
        average: Average accuracy on all test sets at the end.
    """

    strategy: str
    balance: str
    settings: dict[str, object]
    target: float
    average: float


@dataclass(frozen=True)
class Grid:
    """All runs of a search.

    Attributes:
        stream: Name of the stream.
        folder: Where its files are.
        points: The runs.
        slack: How much target accuracy is given for a stronger penalty.
    """

    stream: str
    folder: Path
    points: list[Point]
    slack: float = 0.01

    def panels(self) -> dict[tuple[str, str], list[Point]]:
        """Group the runs.

        Returns:
            Runs by strategy and balance, in order.
        """
        found: dict[tuple[str, str], list[Point]] = {}
        for point in self.points:
            found.setdefault((point.strategy, point.balance), []).append(point)
        return found

    def chosen(self, strategy: str, balance: str) -> Point:
        """Choose by target accuracy alone.

        A weaker penalty hinders the newest task less, so that the best target accuracy asks for none. What is chosen is
        the strongest one, then the largest damping, whose target accuracy is within ``slack`` of the best.

        Args:
            strategy: Name of the strategy.
            balance: How the penalty was weighed.

        Returns:
            The run; of equals that with the better target accuracy.
        """
        points = self.panels()[strategy, balance]
        best = max(point.target for point in points)
        near = [point for point in points if point.target >= best - self.slack]
        return max(near, key=lambda p: (p.settings["strength"], p.settings["damping"], p.target))


def search(
    stream: str,
    strategies: Sequence[str],
    axes: Mapping[str, Sequence[float]],
    *,
    out: str | Path,
    balances: Sequence[str] = ("none",),
    tasks: int = 5,
    seed: int = 0,
    budget: Budget | None = None,
    slack: float = 0.01,
    fresh: bool = False,
    threads: int | None = None,
    listener: Listener | None = None,
) -> Grid:
    """Run every strategy with all combinations of settings.

    Args:
        stream: Name of the stream.
        strategies: Names of the strategies.
        axes: Values of ``lr``, ``damping`` and ``strength``; a strategy without penalty has the first alone.
        out: Folder for runs, ``grid.jsonl`` and the scatter of target against average accuracy.
        balances: How penalties are weighed.
        tasks: Number of tasks, at least two.
        seed: Of all runs.
        budget: What all runs have in common; ``held_out`` must be above 0.
        slack: How much target accuracy is given for a stronger penalty, from 0 to 1.
        fresh: Throw away what these runs did before.
        threads: Torch threads.
        listener: Hears how it goes.

    Returns:
        All runs.

    Raises:
        ExperimentError: If anything given is unknown or out of range; before anything is written.
    """
    budget = budget or Budget()
    if stray := [name for name in axes if name not in AXES]:
        raise ExperimentError(f"{stray[0]!r} is no axis of a grid; known: {', '.join(AXES)}")
    if not axes or any(len(set(values)) < len(values) or not values for values in axes.values()):
        raise ExperimentError("a grid needs an axis at least, with different values")
    if not balances or any(balance not in BALANCES for balance in balances):
        raise ExperimentError(f"balances must be among {', '.join(BALANCES)}, got {', '.join(balances) or 'none'}")
    if not 0 <= slack <= 1:
        raise ExperimentError(f"slack must be from 0 to 1, got {slack:g}")
    if tasks < 2 or budget.held_out < 1:
        raise ExperimentError("choosing by the newest task needs two tasks at least, and held-out examples")
    plans = []
    for name in strategies:
        plain = get_strategy(name).strength is None
        own = {key: axes[key] for key in axes if key == "lr" or not plain}
        for balance in ("none",) if plain else balances:
            for values in itertools.product(*own.values()):
                chosen: dict[str, object] = dict(zip(own, values, strict=True))
                settings = {name: chosen if plain else {**chosen, "balance": balance}}
                plans += plans_of(stream, [name], tasks, [seed], budget, settings)
    folder, found = carry_out(plans, out, fresh, threads, listener)
    points = []
    for plan, result in zip(plans, found, strict=True):
        target = [float(value) for value in result["target"][1:]]  # type: ignore[index]
        average = metrics_of(result["initial"], result["matrix"]).average_accuracy  # type: ignore[arg-type]
        settings_of: dict[str, object] = result["settings"]  # type: ignore[assignment]
        points.append(Point(plan.strategy, plan.balance, settings_of, sum(target) / len(target), average))
    grid = Grid(stream, folder, points, slack)
    write_text(folder / POINTS, "".join(json.dumps(point._asdict()) + "\n" for point in points))
    _draw(grid)
    return grid


def choices(grid: Grid) -> Table:
    """Show what was chosen and what it brought.

    Args:
        grid: All runs.

    Returns:
        A row for each strategy and balance: settings chosen by target accuracy, both accuracies, the best average
        accuracy of the grid, and the correlation of both accuracies over the grid.
    """
    rows = []
    for (strategy, balance), points in grid.panels().items():
        chosen = grid.chosen(strategy, balance)
        cells = [f"{100 * value:.1f}" for value in (chosen.target, chosen.average, max(p.average for p in points))]
        rows.append(
            [get_strategy(strategy).title, describe(chosen.settings), *cells, number(correlation(points), ".2f")]
        )
    names = ["target [%]", "average [%]", "best average [%]", "correlation"]
    return Table(["strategy", "chosen by target accuracy", *names], rows)


def correlation(points: Sequence[Point]) -> float:
    """Correlate target and average accuracy.

    Args:
        points: Runs.

    Returns:
        Pearson's coefficient; NaN where one of the two does not vary.
    """
    try:
        return statistics.correlation([point.target for point in points], [point.average for point in points])
    except statistics.StatisticsError:  # one of the two is constant, or there is one point
        return math.nan


def _draw(grid: Grid) -> None:
    need("matplotlib", "experiments")
    from kronfac.plots import scatters

    titles = {"none": "fixed weights", "adaptive": "balanced"}
    balances = list(dict.fromkeys(point.balance for point in grid.points))
    panels = {}
    for (strategy, balance), points in grid.panels().items():
        pairs = [(100 * point.target, 100 * point.average) for point in points]
        label = f"{get_strategy(strategy).title}, {titles[balance]}\nr = {number(correlation(points), '.2f')}"
        panels[label] = pairs
    axes = scatters(panels, "target accuracy [%]", "average accuracy [%]", columns=max(1, len(panels) // len(balances)))
    save_figure(axes[0], grid.folder / SCATTER)
