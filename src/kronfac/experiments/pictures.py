"""The PNG pictures of a comparison."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kronfac.experiments.errors import need
from kronfac.experiments.files import replace_atomically
from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.results import Results
from kronfac.experiments.tables import curves, grid_table

if TYPE_CHECKING:
    import pandas as pd

#: Horizontal axes, by the word in the pictures' file names.
AXES = {"steps": "step", "seconds": "seconds", "epochs": "epoch"}


def write_pictures(results: Results) -> list[Path]:
    """Draw the compared metric, and its counterpart on the test set, against steps, epochs and seconds.

    Args:
        results: The comparison.

    Returns:
        The files written: ``<metric>-<axis>.png``, and ``grid-<optimizer>-<hyper-parameter>.png`` for each grid.
    """
    need("matplotlib", "experiments")
    from kronfac import plots

    plan = results.plan
    table, names = _drawn(results)
    counterpart = plan.metric.replace("train_", "test_") if plan.metric.startswith("train_") else "train_loss"
    written = []
    for metric in (plan.metric, counterpart):
        for word, column in AXES.items():
            axes = plots.training_curves(table, column, metric, names=names, focus=0.03, title=plan.problem)
            written.append(save_figure(axes, results.folder / f"{metric.replace('_', '-')}-{word}.png"))
    for optimizer, axes_of_grid in plan.grid.items():
        if not results.grids.get(optimizer):
            continue
        points = grid_table(results, optimizer).rename(columns={"final": plan.metric})
        for name in axes_of_grid:
            title = f"{plan.problem}: {get_optimizer(optimizer).title}"
            searched = optimizer in plan.tried
            axes = plots.grid_profile(points, name, plan.metric, searched=searched, title=title)
            written.append(save_figure(axes, results.folder / f"grid-{optimizer}-{name}.png"))
    return written


def _drawn(results: Results) -> tuple[pd.DataFrame, list[str]]:
    """Curves of finished runs, and a label for each optimiser.

    A mean goes as far as all its runs do: one that diverged, or has only begun, would cut the others short. It is left
    to pictures of an optimiser of which no run has finished, and the label says how many are in the mean.

    Returns:
        A row per evaluation, and the labels in the order of the optimisers.
    """
    runs, labels = [], {}
    for name in results.plan.optimizers:
        own, title = results.of(name), get_optimizer(name).title
        kept = [run for run in own if run.status == "done"] or own
        runs += kept
        labels[title] = title if len(kept) == len(own) else f"{title} ({len(kept)} of {len(own)} seeds)"
    table = curves(replace(results, runs=runs))
    table["optimizer"] = table["optimizer"].map(labels)
    return table, list(labels.values())


def save_figure(axes: object, path: Path) -> Path:
    """Write the figure of some axes as PNG; the file appears whole or not at all.

    Args:
        axes: The axes.
        path: The file.

    Returns:
        The file.
    """
    with replace_atomically(path) as stream:
        axes.figure.savefig(stream, format="png")  # type: ignore[attr-defined]
    return path
