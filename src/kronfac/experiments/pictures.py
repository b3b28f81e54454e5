"""The PNG pictures of a comparison."""

from __future__ import annotations

from pathlib import Path

from kronfac.experiments.errors import need
from kronfac.experiments.files import replace_atomically
from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.records import read_records
from kronfac.experiments.results import Results, run_folder
from kronfac.experiments.runner import METRICS
from kronfac.experiments.tables import curves, grid_table

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

    table, plan = curves(results), results.plan
    names = [get_optimizer(name).title for name in plan.optimizers]
    counterpart = plan.metric.replace("train_", "test_") if plan.metric.startswith("train_") else "train_loss"
    written = []
    for metric in (plan.metric, counterpart):
        for word, column in AXES.items():
            axes = plots.training_curves(table, column, metric, names=names, focus=0.03, title=plan.problem)
            written.append(_save(axes, results.folder / f"{metric.replace('_', '-')}-{word}.png"))
    for optimizer, axes_of_grid in plan.grid.items():
        if not results.grids.get(optimizer):
            continue
        points = grid_table(results, optimizer).rename(columns={"final": plan.metric})
        for name in axes_of_grid:
            axes = plots.grid_profile(
                points, name, plan.metric, title=f"{plan.problem}: {get_optimizer(optimizer).title}"
            )
            written.append(_save(axes, results.folder / f"grid-{optimizer}-{name}.png"))
    return written


def write_diagnostics(results: Results) -> list[Path]:
    """Draw what self-tuning optimisers reported, one picture for each of their runs.

    Args:
        results: The comparison.

    Returns:
        The files written: ``diagnostics-<optimizer>-<seed>.png``.
    """
    need("matplotlib", "experiments")
    from kronfac.plots.diagnostics import step_reports

    written = []
    for run in results.runs:
        settings = run.settings
        if not get_optimizer(settings.optimizer).closure:
            continue
        records = read_records(run_folder(results.folder, settings) / METRICS)
        panels = step_reports([r for r in records if "step_lam" in r], prefix="step_")
        written.append(_save(panels[0], results.folder / f"diagnostics-{settings.optimizer}-{settings.seed}.png"))
    return written


def _save(axes: object, path: Path) -> Path:
    with replace_atomically(path) as stream:
        axes.figure.savefig(stream, format="png")  # type: ignore[attr-defined]
    return path
