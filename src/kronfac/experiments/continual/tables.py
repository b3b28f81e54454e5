"""What strategies remember, as people read it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from kronfac.experiments.continual.balances import BALANCES
from kronfac.experiments.continual.metrics import Metrics
from kronfac.experiments.continual.points import Grid, Point
from kronfac.experiments.continual.results import Failure, Results
from kronfac.experiments.continual.strategies import get_strategy
from kronfac.experiments.present import Table, number


def summary(results: Results) -> Table:
    """Show the figures, best average accuracy first.

    Args:
        results: The comparison.

    Returns:
        A row for each strategy: means over seeds in percent, with deviations where there are several. *Own statistics*
        is the average accuracy with those of the test batches in batch norm.
    """
    rows, normed = [], False
    for name in results.done:
        runs, failed = results.runs[name], results.failed(name)
        columns = list(zip(*results.metrics(name), strict=True))
        seconds = [float(run["seconds"]) for run in runs]  # type: ignore[arg-type]
        cells = [_percent(values) for values in columns]
        own: list[list[float]] = [run["adapted"] for run in runs]  # type: ignore[misc]
        normed = own[0] is not None
        if normed:
            cells.append(_percent([sum(row) / len(row) for row in own]))
        settings = describe(runs[0]["settings"])
        if failed:
            settings += f"; {len(runs)} of {len(runs) + failed} seeds, others failed"
        cells = [get_strategy(name).title, settings, *cells, f"{statistics.mean(seconds):.1f}"]
        rows.append((-sum(columns[0]) / len(runs), cells, failed))
    rows.sort(key=lambda row: row[0])
    names = [field.replace("_", " ") + " [%]" for field in Metrics._fields]
    if normed:
        names.append("own statistics [%]")
    marks = {index: "bad" for index, (_, _, failed) in enumerate(rows) if failed}
    return Table(["strategy", "settings", *names, "seconds"], [cells for _, cells, _ in rows], marks, words=(0, 1))


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
    return Table(
        ["strategy", "chosen by target accuracy", "target [%]", "average [%]", "best average [%]", "correlation"],
        rows,
        words=(0, 1),
    )


def points_table(grid: Grid) -> Table:
    """Show all runs of a grid, those chosen marked.

    Args:
        grid: All runs.

    Returns:
        A row for each, best average accuracy of its strategy first.
    """
    rows: list[list[str]] = []
    marks: dict[int, str] = {}
    for (strategy, balance), points in grid.panels().items():
        chosen = grid.chosen(strategy, balance)
        for point in sorted(points, key=lambda p: -p.average):
            if point is chosen:
                marks[len(rows)] = "chosen"
            cells = [f"{100 * value:.1f}" for value in (point.target, point.average)]
            rows.append([get_strategy(strategy).title, describe(point.settings), *cells])
    return Table(["strategy", "settings", "target [%]", "average [%]"], rows, marks, words=(0, 1))


def settings_view(results: Results) -> Table:
    """Show all settings of the runs but what decides their names.

    Args:
        results: The comparison.

    Returns:
        A row for each strategy.
    """
    rows = []
    for name in results.done:
        settings: dict[str, object] = results.runs[name][0]["settings"]  # type: ignore[assignment]
        left = {key: value for key, value in settings.items() if key not in ("stream", "strategy", "seed", "tasks")}
        words = ", ".join(f"{key.replace('_', ' ')} {number(value, 'g')}" for key, value in left.items())
        seeds = ", ".join(str(run["settings"]["seed"]) for run in results.runs[name])  # type: ignore[index]
        rows.append([get_strategy(name).title, get_strategy(name).description, words, seeds])
    return Table(["strategy", "what it does", "settings", "seeds"], rows, words=(0, 1, 2, 3))


def failures_view(failures: Iterable[Failure]) -> Table:
    """Show the runs that came to no end.

    Args:
        failures: The failures.

    Returns:
        A row for each.
    """
    rows = [
        [get_strategy(str(f.settings["strategy"])).title, describe(f.settings), str(f.settings["seed"]), f.reason]
        for f in failures
    ]
    marks = dict.fromkeys(range(len(rows)), "bad")
    return Table(["strategy", "settings", "seed", "reason"], rows, marks, words=(0, 1, 3))


def describe(settings: object) -> str:
    """Say what a run was weighed by.

    Args:
        settings: ``settings`` of its ``result.json``.

    Returns:
        One line; without what does not apply.
    """
    known: dict[str, object] = settings  # type: ignore[assignment]
    words = [f"lr {known['lr']:g}"]
    if known["strength"]:
        words += [f"{name} {known[name]:g}" for name in ("strength", "damping") if known[name]]
        words += [BALANCES[str(known["balance"])].title] if known["balance"] != "none" else []
    return ", ".join(words)


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


def _percent(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) < 2 or mean != mean:
        return number(100 * mean, ".1f")
    return f"{100 * mean:.1f} ± {100 * statistics.stdev(values):.1f}"
