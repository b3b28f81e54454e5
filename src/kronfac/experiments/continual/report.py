"""The report of a stream: one HTML file with what was compared, what was searched, or both."""

from __future__ import annotations

from pathlib import Path

from kronfac.experiments.continual.charts import grid_data, results_data
from kronfac.experiments.continual.pictures import draw_matrices, draw_scatter
from kronfac.experiments.continual.points import ABOUT as GRID
from kronfac.experiments.continual.points import Grid, read_grid
from kronfac.experiments.continual.results import ABOUT as COMPARISON
from kronfac.experiments.continual.results import Failure, Results, read_results
from kronfac.experiments.continual.streams import get_stream
from kronfac.experiments.continual.tables import choices, failures_view, points_table, settings_view, summary
from kronfac.experiments.errors import ExperimentError, need
from kronfac.experiments.files import write_text
from kronfac.experiments.page import heading_html, note_html, origin_html, page_html, table_html

REPORT = "report.html"
_FIGURES = (
    "R is the matrix of accuracies on task j after task i. Average accuracy: mean of its last row. Backward transfer: "
    "mean of R_Tj - R_jj. Forward transfer: mean of R_(j-1)j less the accuracy of the untrained network. Forgetting: "
    "mean of max_i R_ij - R_Tj. Own statistics: average accuracy with the test batches' own statistics in batch norm. "
    "± is the standard deviation over seeds."
)
_CHOICE = (
    "Target accuracy is that of each task but the first right after it was learned, on held-out training examples: all "
    "that a learner without data of earlier tasks can choose by. Chosen is the strongest penalty, then the largest "
    "damping, whose target accuracy is within {slack:g} percentage points of the best. Larger marks in the chart are "
    "what was chosen."
)
_CURVES = """<h2>Accuracy after each task</h2>
<div class="controls"><label>Accuracy <select id="measured"></select></label></div>
<div class="chart" id="after-tasks"></div>
<h2>Accuracy matrices</h2>
<div class="maps" id="matrices"></div>"""
_SCATTER = '<h3>Target against average accuracy</h3>\n<div class="chart" id="scatter"></div>'


def need_for_report() -> None:
    """Import what pictures and report need: better missed now than at the end."""
    for module in ("matplotlib", "plotly"):
        need(module, "experiments")


def read_stream(folder: Path) -> tuple[Results | None, Grid | None]:
    """Read a folder that `compare` or `search` wrote, finished or not.

    Args:
        folder: The folder.

    Returns:
        The comparison and the search, each None if no run of it is done; one of them is not.

    Raises:
        ExperimentError: If the folder holds neither, none of its runs is done, or a file is damaged.
    """
    results = read_results(folder) if (folder / COMPARISON).exists() else None
    grid = read_grid(folder) if (folder / GRID).exists() else None
    if results is None and grid is None:
        raise ExperimentError(f"{folder} holds no runs of kronfac continual: no {COMPARISON} and no {GRID}")
    results, grid = results if results and results.done else None, grid if grid and grid.points else None
    if results is None and grid is None:
        raise ExperimentError(f"{folder}: no run of kronfac continual is done, so that there is nothing to report yet")
    return results, grid


def write_report(folder: Path) -> Path:
    """Draw the pictures and write ``report.html`` into a folder that `compare` or `search` wrote, finished or not.

    Args:
        folder: The folder.

    Returns:
        The path of the page.

    Raises:
        ExperimentError: If there is nothing to report, or a file is damaged.
    """  # noqa: DOC502
    results, grid = read_stream(folder)
    one: Results | Grid = results or grid  # type: ignore[assignment]
    data: dict[str, object] = {
        "strategies": None if results is None else results_data(results),
        "grid": None if grid is None else grid_data(grid),
    }
    stream = get_stream(one.stream)
    # How long tasks really were is among the settings.
    parts = [heading_html(one.stream, stream.description.removesuffix(f", {stream.epochs} epochs a task"))]
    if results is not None:
        draw_matrices(results)
        parts += _comparison(results)
    if grid is not None:
        draw_scatter(grid)
        parts += _search(grid)
    path = folder / REPORT
    write_text(path, page_html(one.stream, parts, data, "continual.js"))
    return path


def _comparison(results: Results) -> list[str]:
    return [
        f"<h2>Results on {results.stream}, {results.tasks} tasks</h2>\n{table_html(summary(results))}",
        _progress(results),
        note_html(_FIGURES),
        _failures(results.failures),
        _CURVES,
        note_html("Row i, column j: accuracy on task j after task i was learned, mean over seeds."),
        f"<h2>Settings</h2>\n{table_html(settings_view(results))}",
        origin_html(results.origin.environment, results.origin.command),
    ]


def _search(grid: Grid) -> list[str]:
    return [
        f"<h2>Settings chosen by the newest task on {grid.stream}, {grid.tasks} tasks</h2>",
        table_html(choices(grid)),
        _progress(grid),
        note_html(_CHOICE.format(slack=100 * grid.slack)),
        _failures(grid.failures),
        _SCATTER,
        f"<h3>All runs of the grid</h3>\n{table_html(points_table(grid))}",
        origin_html(grid.origin.environment, grid.origin.command),
    ]


def _progress(one: Results | Grid) -> str:
    return note_html(one.progress.capitalize() + ".") if one.progress else ""


def _failures(failures: list[Failure]) -> str:
    return f"<h3>Runs that failed</h3>\n{table_html(failures_view(failures))}" if failures else ""
