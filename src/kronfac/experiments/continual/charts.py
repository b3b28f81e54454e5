"""The numbers that the charts of a report draw, in percent."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kronfac.experiments.continual.balances import BALANCES
from kronfac.experiments.continual.points import Grid
from kronfac.experiments.continual.results import Results
from kronfac.experiments.continual.strategies import get_strategy
from kronfac.experiments.continual.tables import describe
from kronfac.experiments.page import dash_of
from kronfac.plots import colour_of

_MARKS = ("circle", "diamond", "square", "cross", "x")


def results_data(results: Results) -> dict[str, object]:
    """Give what the curves and heat maps of a comparison show.

    Args:
        results: The comparison.

    Returns:
        ``tasks``, and for each strategy ``title``, ``colour``, ``dash``, ``matrix`` and ``so_far`` (mean accuracy on
        the tasks learned so far), each with its standard deviation over seeds, None where there is one seed.
    """
    titles = [get_strategy(name).title for name in results.done]
    series = []
    for name, title in zip(results.done, titles, strict=True):
        matrices = 100 * results.matrices(name)
        learned = [matrices[:, i, : i + 1].mean(1) for i in range(results.tasks)]
        series.append(
            {
                "title": title,
                "colour": colour_of(title, titles),
                "dash": dash_of(title, titles),
                "matrix": matrices.mean(0).tolist(),
                "matrix_spread": _spread(matrices),
                "so_far": [float(values.mean()) for values in learned],
                "so_far_spread": None if len(matrices) < 2 else [float(values.std()) for values in learned],
            }
        )
    return {"tasks": results.tasks, "series": series}


def grid_data(grid: Grid) -> dict[str, object]:
    """Give what the scatter of a search shows.

    Args:
        grid: All runs.

    Returns:
        For each strategy and balance ``title``, ``colour``, ``symbol`` and, for each run, ``target``, ``average``,
        ``settings`` and ``chosen``.
    """
    titles = list(dict.fromkeys(get_strategy(point.strategy).title for point in grid.points))
    balances = list(dict.fromkeys(point.balance for point in grid.points))
    series = []
    for (strategy, balance), points in grid.panels().items():
        title, chosen = get_strategy(strategy).title, grid.chosen(strategy, balance)
        series.append(
            {
                "title": title if balance == "none" else f"{title}, {BALANCES[balance].title}",
                "colour": colour_of(title, titles),
                "symbol": _MARKS[balances.index(balance) % len(_MARKS)],
                "target": [100 * point.target for point in points],
                "average": [100 * point.average for point in points],
                "settings": [describe(point.settings) for point in points],
                "chosen": [point is chosen for point in points],
            }
        )
    return {"series": series}


def _spread(matrices: Tensor) -> Sequence[Sequence[float]] | None:
    return None if len(matrices) < 2 else matrices.std(0).tolist()
