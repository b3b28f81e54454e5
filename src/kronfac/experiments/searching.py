"""Points that a search comes to, as runs of a comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.plan import Plan
from kronfac.experiments.results import read_run
from kronfac.experiments.search import Axis, Range, Search, Trials, axes_of
from kronfac.experiments.settings import RunSettings


def searching(plan: Plan, search: Search) -> Plan:
    """Check a search, and write what it is about into the plan.

    Args:
        plan: The plan of a comparison without a grid.
        search: The search.

    Returns:
        The plan, of which nothing was tried yet.

    Raises:
        ExperimentError: If something does not fit.
    """
    if plan.grid:
        raise ExperimentError("a search and a grid are two ways of tuning: give one of them")
    if search.trials < 1:
        raise ExperimentError(f"trials must be a whole number of at least 1, got {search.trials!r}")
    for name in search.axes:
        if name not in plan.optimizers:
            get_optimizer(name)
            raise ExperimentError(f"a range is given for {name!r}, which is not among the optimisers searched")
    axes = {name: _axes(plan, search, name) for name in plan.optimizers}
    grid = {
        name: {key: list(axis.ends if isinstance(axis, Range) else axis) for key, axis in own.items()}
        for name, own in axes.items()
    }
    return replace(plan, grid=grid, tried={name: [] for name in plan.optimizers})


def try_points(
    plan: Plan,
    search: Search,
    name: str,
    folder: Path,
    note: Callable[[Plan], None],
    train: Callable[[RunSettings], None],
) -> Plan:
    """Run an optimiser's trials, one after the other.

    Args:
        plan: The plan.
        search: The search.
        name: The optimiser.
        folder: The comparison's folder.
        note: Writes the plan down, before each run.
        train: Does a run, unless it is there already.

    Returns:
        The plan with the points that were tried.
    """
    base = plan.hyperparameters[name]
    trials = Trials(_axes(plan, search, name), base, plan.seeds[0])
    for _ in range(search.trials):
        point = trials.ask()
        plan = replace(plan, tried={**plan.tried, name: [*plan.tried[name], point]})
        note(plan)
        settings = plan.settings(name, get_optimizer(name).resolve(base, point), plan.seeds[0], tuning=True)
        train(settings)
        trials.tell(read_run(folder, settings).final(plan.metric))
    return plan


def _axes(plan: Plan, search: Search, name: str) -> dict[str, Axis]:
    return axes_of(get_optimizer(name), plan.hyperparameters[name], search.axes.get(name, {}))
