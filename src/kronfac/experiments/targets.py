"""When each optimiser reaches a stated value of the compared metric, in steps and in seconds of training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kronfac.experiments.errors import need
from kronfac.experiments.files import write_csv, write_text
from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.present import Table, as_markdown, heading, number, ratio
from kronfac.experiments.results import Results, RunResult
from kronfac.experiments.tables import EXTENT, first_at, mean

if TYPE_CHECKING:
    import pandas as pd

CSV, MARKDOWN = "targets.csv", "targets.md"
_COLUMNS = ["optimizer", "target", "reached", "seeds", *EXTENT, "seconds_low", "seconds_high", "over_fastest"]
_COLUMNS += ["best", "trained_seconds"]


def targets(results: Results) -> pd.DataFrame:
    """Say when each optimiser reaches each stated value.

    Times are those of the first evaluation at or below the value, without interpolation; evaluations are not counted in
    seconds. A run that diverges later has reached what it reached.

    Args:
        results: The comparison; its plan holds the values.

    Returns:
        A row per value and optimiser: ``optimizer``, ``target``, ``reached`` and ``seeds`` (how many runs of how many),
        the means over seeds of ``steps``, ``epochs`` and ``seconds``, the least and greatest ``seconds_low`` and
        ``seconds_high``, and ``over_fastest`` (mean seconds over those of the fastest optimiser for this value); these
        are NaN unless every seed reached it. Then ``best``, the lowest value of any evaluation, and
        ``trained_seconds``, those of the last evaluation, both means over seeds.
    """
    rows = []
    for target in results.plan.targets:
        group = [_row(results, name, target) for name in results.plan.optimizers]
        fastest = min((row["seconds"] for row in group if row["seconds"] == row["seconds"]), default=math.nan)
        rows += [{**row, "over_fastest": row["seconds"] / fastest if fastest else math.nan} for row in group]
    return need("pandas", "experiments").DataFrame(rows, columns=_COLUMNS)


def _row(results: Results, name: str, target: float) -> dict[str, Any]:
    metric, runs = results.plan.metric, results.of(name)
    found = [record for run in runs if (record := first_at(run, metric, target)) is not None]
    complete: list[Mapping[str, float]] = found if len(found) == len(runs) else []
    seconds = [record["seconds"] for record in complete]
    begun = [run for run in runs if run.evaluations]
    return {
        "optimizer": get_optimizer(name).title,
        "target": target,
        "reached": len(found),
        "seeds": len(runs),
        **{key: mean([record[source] for record in complete]) for key, source in EXTENT.items()},
        "seconds_low": min(seconds, default=math.nan),
        "seconds_high": max(seconds, default=math.nan),
        "best": mean([_best(run, metric) for run in begun]),
        "trained_seconds": mean([run.evaluations[-1]["seconds"] for run in begun]),
    }


def _best(run: RunResult, metric: str) -> float:
    return min(record[metric] for record in run.evaluations)


def target_view(results: Results) -> Table:
    """Show `targets`.

    Args:
        results: The comparison.

    Returns:
        A row per value and optimiser; where it was not reached by every seed, how close it came.
    """
    rows: list[list[str]] = []
    marks = {}
    for row in targets(results).to_dict("records"):
        cells = [number(row["target"]), row["optimizer"]]
        if row["seeds"] and row["reached"] == row["seeds"]:
            several = row["seeds"] > 1
            spread = f" ({row['seconds_low']:.2f} to {row['seconds_high']:.2f})" if several else ""
            cells += [number(row["steps"], ".0f"), number(row["epochs"], ".2f"), number(row["seconds"], ".2f") + spread]
            cells += [ratio(row["over_fastest"])]
        else:
            marks[len(rows)] = "bad"
            partly = f"{row['reached']} of {row['seeds']} seeds"
            cells += [partly if row["reached"] else "not reached", "–", "–", "–"]
        cells += [f"{number(row['best'])} in {number(row['trained_seconds'], '.1f')} s"]
        rows.append(cells)
    columns = [
        heading(results.plan.metric),
        "optimiser",
        "steps",
        "epochs",
        "seconds",
        "of the fastest",
        "best of the whole run",
    ]
    return Table(columns, rows, marks, words=(1,))


def write_targets(results: Results) -> list[Path]:
    """Write ``targets.csv`` and ``targets.md`` into the comparison's folder, if its plan holds values to reach.

    Args:
        results: The comparison.

    Returns:
        The files.
    """
    if not results.plan.targets:
        return []
    path, text = results.folder / CSV, results.folder / MARKDOWN
    write_csv(path, targets(results).to_dict("records"))
    write_text(text, f"`{results.command}`\n\n{as_markdown(target_view(results))}")
    return [path, text]
