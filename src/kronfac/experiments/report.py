"""The report of a comparison: one HTML file that needs nothing else, neither network nor neighbours."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from html import escape
from importlib import resources
from pathlib import Path

from kronfac.experiments.environment import warning
from kronfac.experiments.errors import need
from kronfac.experiments.files import without_nan, write_text
from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.pictures import write_pictures
from kronfac.experiments.present import Table, environment_table, grid_view, reach_view, settings_table, summary_view
from kronfac.experiments.problems import get_problem
from kronfac.experiments.results import Results
from kronfac.experiments.tables import headlines, reaches, summary
from kronfac.experiments.targets import target_view, targets, write_targets

REPORT, SUMMARY = "report.html", "summary.json"


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
    assets = resources.files("kronfac.experiments") / "assets"
    script, style = ((assets / name).read_text(encoding="utf-8") for name in ("report.js", "report.css"))
    plotly = need("plotly.offline", "experiments").get_plotlyjs()
    told = "".join(f"<li>{escape(line)}</li>" for line in headlines(results))
    data = json.dumps(_curve_data(results), allow_nan=False).replace("</", "<\\/")
    seeds = f"{len(plan.seeds)} seed{'s' if len(plan.seeds) > 1 else ''}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(plan.problem)} · kronfac</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{escape(plan.problem)}</h1>
<p class="lead">{escape(problem.description)} · {seeds} · compared by {escape(plan.metric.replace("_", " "))}</p>
{f'<ul class="headlines">{told}</ul>' if told else ""}
<h2>Results</h2>
{_table(summary_view(results))}
{_targets(results)}
<h2>When each optimiser reaches what another has in the end</h2>
{_table(reach_view(results))}
<p class="note">Ratios are to the steps and seconds at which the other optimiser first had that value itself. Seconds
are those of training: evaluation is not counted. Both are read at the first evaluation at or below the target.</p>
<h2>Curves</h2>
<div class="controls">
<label>Metric <select id="metric"></select></label>
<label>Left axis <select id="progress">
<option value="step">steps</option><option value="epoch">epochs</option></select></label>
<label><input type="checkbox" id="logarithmic" checked> logarithmic</label>
</div>
<div class="charts"><div class="chart" id="by-progress"></div><div class="chart" id="by-seconds"></div></div>
{_grids(results, grid_pictures)}
<h2>Hyper-parameters of the runs above</h2>
{_table(settings_table(results))}
<p class="note">Where no grid was searched these are the problem's tuned defaults ({escape(problem.tuned_over)}) with
what the command changed.</p>
<h2>Environment</h2>
{_table(environment_table(results))}
<p class="note">{escape(warning(results.environment))}</p>
<h2>Command</h2>
<pre>{escape(results.command)}</pre>
</main>
<script type="application/json" id="curves">{data}</script>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""


def _targets(results: Results) -> str:
    if not results.plan.targets:
        return ""
    what = escape(results.plan.metric.replace("_", " "))
    return f"""<h2>When each optimiser reaches a stated {what}</h2>
{_table(target_view(results))}
<p class="note">At the first evaluation at or below the value, in seconds of training; means over seeds, least and
greatest in brackets.</p>"""


def _curve_data(results: Results) -> dict[str, object]:
    from kronfac.plots import colour_of

    metrics = get_problem(results.plan.problem).metrics
    titles = [get_optimizer(name).title for name in results.plan.optimizers]
    runs = []
    for run in results.runs:
        title = get_optimizer(run.settings.optimizer).title
        columns = {key: [record[key] for record in run.evaluations] for key in ("step", "epoch", "seconds", *metrics)}
        runs.append(
            {"optimizer": title, "seed": run.settings.seed, "colour": colour_of(title, titles), "columns": columns}
        )
    return {"metrics": metrics, "metric": results.plan.metric, "seeds": len(results.plan.seeds), "runs": runs}


def _grids(results: Results, pictures: Iterable[Path]) -> str:
    if not results.grids:
        return ""
    parts = ["<h2>Tuning</h2>"]
    drawn = list(pictures)
    for name in results.grids:
        parts.append(f"<h3>{escape(get_optimizer(name).title)}</h3>{_table(grid_view(results, name))}")
        mine = [path for path in drawn if path.name.startswith(f"grid-{name}-")]
        encoded = (base64.b64encode(path.read_bytes()).decode() for path in mine)
        images = (
            f'<img alt="{escape(p.stem)}" src="data:image/png;base64,{e}">' for p, e in zip(mine, encoded, strict=True)
        )
        parts.append(f'<div class="pictures">{"".join(images)}</div>')
    return "\n".join(parts)


def _table(table: Table) -> str:
    kinds = [' class="text"' if index in table.words else "" for index in range(len(table.columns))]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, table.columns, strict=True))
    body = []
    for index, row in enumerate(table.rows):
        mark = f' class="{table.marks[index]}"' if table.marks.get(index) else ""
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        body.append(f"<tr{mark}>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
