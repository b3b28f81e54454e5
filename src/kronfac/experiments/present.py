"""Tables as people read them: texts in rows, the same for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.problems import get_problem
from kronfac.experiments.results import Results, at_edge, best_point
from kronfac.experiments.tables import grid_table, in_percent, reaches, summary


@dataclass(frozen=True)
class Table:
    """Texts in rows.

    Attributes:
        columns: Headings.
        rows: Cells.
        marks: ``"chosen"`` or ``"bad"`` for rows that stand out, by index.
        words: Indices of columns that hold words rather than numbers, and are aligned so.
    """

    columns: list[str]
    rows: list[list[str]]
    marks: dict[int, str] = field(default_factory=dict)
    words: tuple[int, ...] = (0,)


def number(value: object, form: str = ".4g") -> str:
    """Word a number.

    Args:
        value: The number, or anything else.
        form: Its format.

    Returns:
        The text; a dash for NaN.
    """
    if isinstance(value, float):
        return "–" if value != value else f"{value:{form}}"
    return str(value)


def ratio(value: float) -> str:
    """Word a ratio.

    Args:
        value: The ratio.

    Returns:
        The text; a dash for NaN, which is what is over nothing.
    """
    return "–" if value != value else f"{value:.2f}×"


def heading(metric: str) -> str:
    """Word a metric as the heading of a column.

    Args:
        metric: Its name.

    Returns:
        The words, with the unit of those that have one.
    """
    return metric.replace("_", " ") + (" [%]" if in_percent(metric) else "")


def as_markdown(table: Table) -> str:
    """Write a table as Markdown.

    Args:
        table: The table.

    Returns:
        Its lines.
    """
    rules = ["---" if index in table.words else "---:" for index in range(len(table.columns))]
    lines = (table.columns, rules, *table.rows)
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def summary_view(results: Results) -> Table:
    """Show `tables.summary`.

    Args:
        results: The comparison.

    Returns:
        A row per optimiser.
    """
    metrics = get_problem(results.plan.problem).metrics
    metrics = [results.plan.metric, *(metric for metric in metrics if metric != results.plan.metric)]
    frame = summary(results)
    shared = frame["equal_seconds"].dropna()
    at = f"{heading(results.plan.metric)} at {shared.mean():.3g} s" if len(shared) else "at equal seconds"
    columns = ["optimiser", "status", *map(heading, metrics), at]
    columns += ["steps", "epochs", "seconds", "ms / step"]
    rows, marks = [], {}
    for index, row in enumerate(frame.to_dict("records")):
        cells = [str(row["optimizer"]), str(row["status"])]
        for metric in metrics:
            spread = (
                f" ± {number(row['spread'], '.2g')}"
                if metric == results.plan.metric and row["spread"] == row["spread"]
                else ""
            )
            cells.append(number(row[metric]) + spread)
        cells += [number(row["at_equal_seconds"]), number(row["steps"], ".0f"), number(row["epochs"], ".1f")]
        cells += [number(row["seconds"], ".2f"), number(row["ms_per_step"], ".2f")]
        rows.append(cells)
        if row["status"] != "done":
            marks[index] = "bad"
    return Table(columns, rows, marks, words=(0, 1))


def reach_view(results: Results) -> Table:
    """Show `tables.reaches`.

    Args:
        results: The comparison.

    Returns:
        A row per ordered pair of optimisers.
    """
    rows = []
    for row in reaches(results).to_dict("records"):
        cells = [row["optimizer"], f"{row['target_of']}'s {number(row['target'])}"]
        if row["reached"] == row["seeds"]:
            cells += [number(row["steps"], ".0f"), ratio(row["steps_ratio"]), ratio(row["epochs_ratio"])]
            cells += [number(row["seconds"], ".2f"), ratio(row["seconds_ratio"])]
        else:
            cells += ["not reached" if row["reached"] == 0 else f"{row['reached']} of {row['seeds']} seeds", *["–"] * 4]
        rows.append(cells)
    return Table(
        ["optimiser", "reaches", "steps", "of its steps", "of its epochs", "seconds", "of its seconds"],
        rows,
        words=(0, 1),
    )


def grid_view(results: Results, optimizer: str) -> Table:
    """Show the grid of an optimiser, the best point first.

    Args:
        results: The comparison.
        optimizer: The optimiser's name.

    Returns:
        A row per point.
    """
    frame = grid_table(results, optimizer).sort_values("final", na_position="last")
    names = list(results.plan.grid[optimizer])
    best = best_point(results.grids[optimizer], results.plan.metric)
    edge = at_edge(results.plan, optimizer, best) if best else []
    rows, marks = [], {}
    for index, row in enumerate(frame.to_dict("records")):
        note = str(row["status"])
        if row["chosen"]:
            note = "chosen" + (f", at the edge of {' and '.join(edge)}" if edge else "")
            marks[index] = "chosen"
        elif row["status"] != "done":
            marks[index] = "bad"
        tried = ("none" if row[name] is None or row[name] != row[name] else number(row[name], "g") for name in names)
        rows.append([*tried, number(row["final"]), note])
    worded = [place for place, name in enumerate(names) if any(isinstance(value, str) for value in frame[name])]
    columns = [*names, f"final {heading(results.plan.metric)}", ""]
    return Table(columns, rows, marks, words=(*worded, len(names) + 1))


def endings_table(results: Results) -> Table:
    """Show why runs diverged.

    Args:
        results: The comparison.

    Returns:
        A row per final run that did.
    """
    failed = [run for run in results.runs if run.status == "diverged"]
    rows = [
        [get_optimizer(run.settings.optimizer).title, str(run.settings.seed), run.note or run.status] for run in failed
    ]
    return Table(["optimiser", "seed", "how it ended"], rows, dict.fromkeys(range(len(rows)), "bad"), words=(0, 2))


def settings_table(results: Results) -> Table:
    """Show every hyper-parameter in use: those that do nothing beside the others are left out.

    Args:
        results: The comparison.

    Returns:
        A row per optimiser.
    """
    rows = []
    for name in results.plan.optimizers:
        spec, values = get_optimizer(name), results.chosen.get(name, results.plan.hyperparameters[name])
        idle = spec.without_effect(values)
        used = (f"{key}={number(value, 'g')}" for key, value in values.items() if key not in idle)
        rows.append([spec.title, ", ".join(used)])
    return Table(["optimiser", "hyper-parameters"], rows, words=(0, 1))


def environment_table(environment: Mapping[str, object]) -> Table:
    """Show on what something was run.

    Args:
        environment: Facts by name.

    Returns:
        A row per fact.
    """
    return Table(["", ""], [[name, str(value)] for name, value in environment.items()], words=(0, 1))
