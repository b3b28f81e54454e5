"""Pictures of what strategies remember."""

from __future__ import annotations

from kronfac.experiments.continual.balances import BALANCES
from kronfac.experiments.continual.points import Grid
from kronfac.experiments.continual.results import Results
from kronfac.experiments.continual.strategies import get_strategy
from kronfac.experiments.continual.tables import correlation
from kronfac.experiments.errors import need
from kronfac.experiments.pictures import save_figure
from kronfac.experiments.present import number

PICTURE, SCATTER = "accuracy-matrices.png", "target-against-average.png"


def draw_matrices(results: Results) -> None:
    """Draw the mean accuracy matrix of each strategy.

    Args:
        results: The comparison, with a run at least.
    """
    need("matplotlib", "experiments")
    from kronfac.plots import accuracy_matrices

    labels = [get_strategy(name).title for name in results.done]
    matrices = [results.matrix(name) for name in results.done]
    axes = accuracy_matrices(matrices, labels, title=f"{results.stream}, {results.tasks} tasks")
    save_figure(axes[0], results.folder / PICTURE)


def draw_scatter(grid: Grid) -> None:
    """Draw target against average accuracy, a panel for each strategy and balance.

    Args:
        grid: All runs, one at least.
    """
    need("matplotlib", "experiments")
    from kronfac.plots import scatters

    balances = list(dict.fromkeys(point.balance for point in grid.points))
    panels = {}
    for (strategy, balance), points in grid.panels().items():
        pairs = [(100 * point.target, 100 * point.average) for point in points]
        label = f"{get_strategy(strategy).title},\n{BALANCES[balance].title}\nr = {number(correlation(points), '.2f')}"
        panels[label] = pairs
    columns = len(balances) if len(balances) > 1 else 4  # where there are several, a row for each strategy
    axes = scatters(panels, "target accuracy [%]", "average accuracy [%]", columns=columns)
    save_figure(axes[0], grid.folder / SCATTER)
