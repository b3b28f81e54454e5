"""The report of a comparison: one HTML file that needs nothing else, neither network nor neighbours."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from pathlib import Path

from kronfac.experiments.files import without_nan, write_text
from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.page import dash_of, heading_html, note_html, origin_html, page_html, pictures_html, table_html
from kronfac.experiments.pictures import write_pictures
from kronfac.experiments.present import endings_table, grid_view, heading, reach_view, settings_table, summary_view
from kronfac.experiments.problems import get_problem
from kronfac.experiments.results import Results
from kronfac.experiments.tables import headlines, reaches, summary
from kronfac.experiments.targets import target_view, targets, write_targets

REPORT, SUMMARY = "report.html", "summary.json"
_CURVES = """<h2>Curves</h2>
<div class="controls">
<label>Metric <select id="metric"></select></label>
<label>Left axis <select id="progress">
<option value="step">steps</option><option value="epoch">epochs</option></select></label>
<label><input type="checkbox" id="logarithmic" checked> logarithmic</label>
</div>
<div class="charts"><div class="chart" id="by-progress"></div><div class="chart" id="by-seconds"></div></div>"""


def write_report(results: Results) -> Path:
    """Write pictures, ``summary.json``, ``report.html`` and, where values to reach were stated, their table.

    Args:
        results: The comparison, finished or not.

    Returns:
        The path of the page.
    """
    pictures = write_pictures(results)
    write_targets(results)
    write_text(results.folder / SUMMARY, json.dumps(as_json(results), indent=2) + "\n")
    path = results.folder / REPORT
    write_text(path, _page(results, [picture for picture in pictures if picture.name.startswith("grid-")]))
    return path


def as_json(results: Results) -> dict[str, object]:
    """Give the outcome of a comparison as plain values.

    Args:
        results: The comparison.

    Returns:
        What ``--json`` prints: the plan, the chosen hyper-parameters, the tables and the headlines; NaN is null.
    """
    return {
        "folder": str(results.folder),
        "command": results.command,
        "plan": results.plan.as_json(),
        "environment": results.environment,
        "chosen": results.chosen,
        "summary": [without_nan(row) for row in summary(results).to_dict("records")],
        "reaches": [without_nan(row) for row in reaches(results).to_dict("records")],
        "targets": [without_nan(row) for row in targets(results).to_dict("records")],
        "headlines": headlines(results),
    }


def _page(results: Results, grid_pictures: Iterable[Path]) -> str:
    plan, problem = results.plan, get_problem(results.plan.problem)
    seeds = f"{len(plan.seeds)} seed{'s' if len(plan.seeds) > 1 else ''}"
    lead = f"{problem.description} · {seeds} · compared by {heading(plan.metric)}"
    parts = [
        heading_html(plan.problem, lead, headlines(results)),
        f"<h2>Results</h2>\n{table_html(summary_view(results))}",
        _endings(results),
        _CURVES,
        _targets(results),
        _reaches(results),
        _grids(results, grid_pictures),
        f"<h2>Hyper-parameters of the runs above</h2>\n{table_html(settings_table(results))}",
        note_html(
            f"Where no grid was searched these are the problem's tuned defaults ({problem.tuned_over}) with what the "
            "command changed."
        ),
        origin_html(results.environment, results.command),
    ]
    return page_html(plan.problem, parts, {"curves": _curve_data(results)}, "report.js")


def _endings(results: Results) -> str:
    table = endings_table(results)
    if not table.rows:
        return ""
    note = note_html("They enter no mean. In the charts a cross marks the last evaluation before.")
    return f"<h3>Runs that diverged</h3>\n{table_html(table)}\n{note}"


def _reaches(results: Results) -> str:
    table = reach_view(results)
    if not table.rows:  # nobody to be compared with
        return ""
    note = note_html(
        "Ratios are to the steps and seconds at which the other optimiser first had that value itself. Seconds are "
        "those of training: evaluation is not counted. Both are read at the first evaluation at or below the target."
    )
    return f"<h2>When each optimiser reaches what another has in the end</h2>\n{table_html(table)}\n{note}"


def _targets(results: Results) -> str:
    if not results.plan.targets:
        return ""
    what = escape(heading(results.plan.metric))
    note = note_html(
        "At the first evaluation at or below the value, in seconds of training; means over seeds, least and greatest "
        "in brackets. The last column is the lowest value of all evaluations and the seconds of the whole run."
    )
    return f"<h2>When each optimiser reaches a stated {what}</h2>\n{table_html(target_view(results))}\n{note}"


def _curve_data(results: Results) -> dict[str, object]:
    from kronfac.plots import colour_of

    metrics = get_problem(results.plan.problem).metrics
    titles = [get_optimizer(name).title for name in results.plan.optimizers]
    runs = []
    for run in results.runs:
        title = get_optimizer(run.settings.optimizer).title
        columns = {key: [record[key] for record in run.evaluations] for key in ("step", "epoch", "seconds", *metrics)}
        runs.append(
            {
                "optimizer": title,
                "seed": run.settings.seed,
                "diverged": run.status == "diverged",
                "colour": colour_of(title, titles),
                "dash": dash_of(title, titles),
                "columns": columns,
            }
        )
    return {
        "metrics": metrics,
        "labels": {metric: heading(metric) for metric in metrics},
        "metric": results.plan.metric,
        "seeds": len(results.plan.seeds),
        "runs": runs,
    }


def _grids(results: Results, pictures: Iterable[Path]) -> str:
    if not results.grids:
        return ""
    parts = ["<h2>Tuning</h2>"]
    drawn = list(pictures)
    for name in results.grids:
        parts.append(f"<h3>{escape(get_optimizer(name).title)}</h3>{table_html(grid_view(results, name))}")
        parts.append(pictures_html(path for path in drawn if path.name.startswith(f"grid-{name}-")))
    return "\n".join(parts)
