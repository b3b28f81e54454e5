"""Table 1 of Puiu (2022) with our figures beside the paper's, as Markdown and CSV."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kronfac.experiments.files import write_csv, write_text
from kronfac.experiments.present import Table
from kronfac.experiments.reproduce.kld_wrm.rows import COLUMNS, Row
from kronfac.experiments.results import RunResult

MARKDOWN, CSV = "table.md", "table.csv"
#: A threshold counts once it is met at this many evaluations: the paper counts "multiple times", to reduce the noise.
TIMES = 2


@dataclass(frozen=True)
class Summary:
    """Our figures of a row.

    Attributes:
        row: The row.
        runs: Finished runs.
        diverged: How many others diverged.
        planned: How many there are to be.
        figures: In the order of `COLUMNS`; NaN where there are not enough runs.
        minutes: Mean minutes of training of a finished run.
    """

    row: Row
    runs: int
    diverged: int
    planned: int
    figures: tuple[float, ...]
    minutes: float


def summarise(row: Row, results: Sequence[RunResult]) -> Summary:
    """Compute a row: counts over all epochs, means and deviations at the last one.

    Args:
        row: The row.
        results: All its runs; those that are not finished count for nothing.

    Returns:
        The summary.
    """
    done = [run.evaluations for run in results if run.status == "done"]
    accuracies = [[100.0 - record["test_error"] for record in run] for run in done]
    losses = [[record["test_loss"] for record in run] for run in done]
    figures = (
        _count([[a >= 98.0 for a in run] for run in accuracies]),
        _count([[a > 98.0 for a in run] for run in accuracies]),
        _count([[a >= 98.5 for a in run] for run in accuracies]),
        _count([[loss <= 0.25 for loss in run] for run in losses]),
        _count([[loss <= 0.2 for loss in run] for run in losses]),
        *_moments([run[-1] for run in accuracies]),
        *_moments([run[-1] for run in losses]),
    )
    minutes = statistics.fmean(run[-1]["seconds"] for run in done) / 60 if done else math.nan
    diverged = sum(run.status == "diverged" for run in results)
    return Summary(row, len(done), diverged, len(results), figures, minutes)


def _count(met: Sequence[Sequence[bool]]) -> float:
    return float(sum(sum(run) >= TIMES for run in met)) if met else math.nan


def _moments(values: Sequence[float]) -> tuple[float, float]:
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def view(summaries: Sequence[Summary]) -> Table:
    """Word the table: each cell is ours, with the paper's in brackets.

    Args:
        summaries: The rows.

    Returns:
        The table.
    """
    rows, marks = [], {}
    for index, summary in enumerate(summaries):
        paper = summary.row.paper or ("",) * len(COLUMNS)
        cells = [
            f"{_word(value, place)}{f' ({theirs})' if theirs else ''}"
            for place, (value, theirs) in enumerate(zip(summary.figures, paper, strict=True))
        ]
        note = f"{summary.runs} of {summary.planned}"
        if summary.diverged:
            note += f", {summary.diverged} diverged"
            marks[index] = "bad"
        rows.append([summary.row.title, note, *cells])
    return Table(["solver", "runs", *COLUMNS], rows, marks, words=(0,))


_FORMS = (".0f",) * 5 + (".2f", ".2f", ".3f", ".3f")


def _word(value: float, place: int) -> str:
    return "–" if math.isnan(value) else f"{value:{_FORMS[place]}}"


def write_tables(folder: Path, summaries: Sequence[Summary], epochs: int) -> None:
    """Write ``table.md`` and ``table.csv``.

    Args:
        folder: Where.
        summaries: The rows.
        epochs: How long the runs are.
    """
    table = view(summaries)
    lines = [
        f"Ours after {epochs} epochs, in brackets the paper's (10 runs, 50 epochs). A run counts once it met the "
        f"threshold after {TIMES} epochs; accuracies are in percent, `μ` and `σ` those of the last epoch.",
        "",
        "| " + " | ".join(table.columns) + " |",
        "| --- " * len(table.columns) + "|",
        *("| " + " | ".join(row) + " |" for row in table.rows),
    ]
    write_text(folder / MARKDOWN, "\n".join(lines) + "\n")
    write_csv(folder / CSV, as_rows(summaries))


def as_rows(summaries: Sequence[Summary]) -> list[dict[str, object]]:
    """Give the table as plain values.

    Args:
        summaries: The rows.

    Returns:
        A mapping for each; NaN stays NaN.
    """
    return [
        {
            "row": s.row.key,
            "solver": s.row.solver,
            "settings": s.row.label,
            "runs": s.runs,
            "diverged": s.diverged,
            "planned": s.planned,
            "minutes": s.minutes,
        }
        | dict(zip(COLUMNS, s.figures, strict=True))
        | {f"paper: {name}": (s.row.paper or ("",) * len(COLUMNS))[i] for i, name in enumerate(COLUMNS)}
        for s in summaries
    ]
