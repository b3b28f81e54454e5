"""Hyper-parameters chosen by the newest task alone, and how far that says anything about all tasks.

A learner that has moved on has no data of earlier tasks to choose by (Lee et al. 2020, A.6). The *target accuracy* is
that of each task but the first, right after it was learned, on training examples that were held out.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from kronfac.experiments.continual.balances import BALANCES
from kronfac.experiments.continual.metrics import metrics_of
from kronfac.experiments.continual.plans import Budget, Done, call_of, carry_out, check_names, plans_of
from kronfac.experiments.continual.points import Grid, Point, save_grid
from kronfac.experiments.continual.report import need_for_report, write_report
from kronfac.experiments.continual.results import Failure, Origin
from kronfac.experiments.continual.runner import Listener
from kronfac.experiments.continual.strategies import get_strategy
from kronfac.experiments.errors import ExperimentError

AXES = ("lr", "damping", "strength")


def search(
    stream: str,
    strategies: Sequence[str],
    axes: Mapping[str, Sequence[float]],
    *,
    out: str | Path,
    balances: Sequence[str] | None = None,
    tasks: int = 5,
    seed: int = 0,
    budget: Budget | None = None,
    slack: float = 0.01,
    fresh: bool = False,
    threads: int | None = None,
    listener: Listener | None = None,
    command: str | None = None,
) -> Grid:
    """Run every strategy with all combinations of settings.

    Args:
        stream: Name of the stream.
        strategies: Names of the strategies.
        axes: Values of ``lr``, ``damping`` and ``strength``; a strategy without penalty has the first alone.
        out: Folder for runs, ``grid.jsonl``, the scatter of target against average accuracy and ``report.html``.
        balances: How penalties are weighed; by default as the budget says.
        tasks: Number of tasks, at least two.
        seed: Of all runs.
        budget: What all runs have in common; ``held_out`` must be above 0.
        slack: How much target accuracy is given for a stronger penalty, from 0 to 1.
        fresh: Throw away what these runs did before.
        threads: Torch threads.
        listener: Hears how it goes.
        command: How this was asked for, to be printed in the report; the Python call by default.

    Returns:
        All runs. One that diverges, or that is refused what it asks for, is among the failures.

    Raises:
        ExperimentError: If anything given is unknown or out of range, before anything is written; or if all runs fail.
    """
    budget = budget or Budget()
    if stray := [name for name in axes if name not in AXES]:
        raise ExperimentError(f"{stray[0]!r} is no axis of a grid; known: {', '.join(AXES)}")
    if not axes or any(len(set(values)) < len(values) or not values for values in axes.values()):
        raise ExperimentError("a grid needs an axis at least, with different values")
    for name, default in (("lr", None), ("damping", 0.0)):
        if name in axes and getattr(budget, name) != default:
            raise ExperimentError(
                f"{name} is an axis of the grid: give it there alone, not {name}={getattr(budget, name):g} too"
            )
    if balances is not None and budget.balance != "none":
        raise ExperimentError(f"balances are what a grid has, not balance={budget.balance!r} beside them")
    balances = (budget.balance,) if balances is None else balances
    if not balances or any(balance not in BALANCES for balance in balances):
        raise ExperimentError(f"balances must be among {', '.join(BALANCES)}, got {', '.join(balances) or 'none'}")
    if not 0 <= slack <= 1:
        raise ExperimentError(f"slack must be from 0 to 1, got {slack:g}")
    if tasks < 2 or budget.held_out < 1:
        raise ExperimentError("choosing by the newest task needs two tasks at least, and held-out examples")
    given = {"axes": dict(axes), "balances": list(balances), "tasks": tasks, "seed": seed, "budget": budget}
    need_for_report()
    check_names(strategies)
    plans = []
    for name in strategies:
        plain = get_strategy(name).strength is None
        own = {key: axes[key] for key in axes if key == "lr" or not plain}
        for balance in ("none",) if plain else balances:
            for values in itertools.product(*own.values()):
                chosen: dict[str, object] = dict(zip(own, values, strict=True))
                settings = {name: chosen if plain else {**chosen, "balance": balance}}
                plans += plans_of(stream, [name], tasks, [seed], budget, settings)
    origin = Origin.now(command or call_of("search", stream, strategies, given, out), threads)

    def grid_of(folder: Path, done: Done, failures: list[Failure]) -> Grid:
        return Grid(stream, folder, _points(done), slack, tasks, failures, origin, len(plans))

    grid = grid_of(*carry_out(plans, out, lambda *state: save_grid(grid_of(*state)), fresh, threads, listener))
    write_report(grid.folder)
    return grid


def _points(done: Done) -> list[Point]:
    points = []
    for plan, result in done:
        target = [float(value) for value in result["target"][1:]]  # type: ignore[index]
        average = metrics_of(result["initial"], result["matrix"]).average_accuracy  # type: ignore[arg-type]
        settings: dict[str, object] = result["settings"]  # type: ignore[assignment]
        points.append(Point(plan.strategy, plan.balance, settings, sum(target) / len(target), average))
    return points
