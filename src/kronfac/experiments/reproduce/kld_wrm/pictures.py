"""The figures of Puiu (2022): two of the main text, and one for each solver of the supplement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kronfac.experiments.errors import need
from kronfac.experiments.pictures import save_figure
from kronfac.experiments.reproduce.kld_wrm.rows import ROWS, Row
from kronfac.experiments.results import RunResult

#: From top to bottom as in the supplement; accuracies are 100 minus the error.
MEASURES = {"test accuracy [%]": "test_error", "test loss": "test_loss", "training loss": "train_loss"}


def write_pictures(folder: Path, runs: Mapping[str, Sequence[RunResult]]) -> list[Path]:
    """Draw what there is.

    Args:
        folder: Where.
        runs: Runs with evaluations by key of the row.

    Returns:
        The files: ``accuracy.png`` and ``loss.png`` with the best rows of the solvers, ``kfac.png`` and the like with a
        column for each row.
    """
    need("matplotlib", "experiments")
    drawn = [ROWS[key] for key in runs if runs[key]]
    best = [row for row in drawn if row.best or row.key == "kfac-ours"]
    written = []
    for name, measure in (("accuracy", "test accuracy [%]"), ("loss", "test loss")):
        if best:
            written.append(_draw(folder / f"{name}.png", best, [measure], runs, solvers=True))
    for prefix in dict.fromkeys(row.key.split("-")[0] for row in drawn):
        rows = [row for row in drawn if row.key.split("-")[0] == prefix]
        written.append(_draw(folder / f"{prefix}.png", rows, list(MEASURES), runs, solvers=False))
    return written


def _draw(
    path: Path, rows: Sequence[Row], measures: Sequence[str], runs: Mapping[str, Sequence[RunResult]], solvers: bool
) -> Path:
    from matplotlib.figure import Figure

    from kronfac.plots.runs import run_lines

    size = (2.7 * len(rows) + 0.4, 2.3 * len(measures) + 0.5)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(len(measures), len(rows), squeeze=False, sharex=True, sharey="row")
    for i, measure in enumerate(measures):
        drawn = [[_line(run, measure) for run in runs[row.key]] for row in rows]
        limits = _limits([values for lines in drawn for _, values in lines])
        for j, (row, lines) in enumerate(zip(rows, drawn, strict=True)):
            title = (f"{row.solver}\n{row.label}" if solvers else row.label) if i == 0 else None
            run_lines(lines, axes=grid[i, j], title=title, y=measure if j == 0 else "", limits=limits)
            grid[i, j].set_xlabel("epochs" if i == len(measures) - 1 else "")
    if not solvers:
        figure.suptitle(rows[0].solver, fontsize="medium", x=0.01, ha="left")
    return save_figure(grid[0, 0], path)


def _limits(runs: Sequence[Sequence[float]]) -> tuple[float, float]:
    """All values but those of the longest run's first fifth, which would squeeze the others together."""
    early = max(1, max(len(values) for values in runs) // 5)
    late = [value for values in runs for value in values[early:]] or [value for values in runs for value in values]
    low, high = min(late), max(late)
    margin = 0.04 * (high - low or 1.0)
    return low - margin, high + margin


def _line(run: RunResult, measure: str) -> tuple[list[float], list[float]]:
    key = MEASURES[measure]
    values = [record[key] for record in run.evaluations]
    if key == "test_error":
        values = [100.0 - value for value in values]
    return [record["epoch"] for record in run.evaluations], values
