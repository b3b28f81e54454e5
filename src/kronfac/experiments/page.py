"""Pages of HTML that need nothing else, neither network nor neighbours: what all reports are made of."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from html import escape
from importlib import resources
from pathlib import Path

from kronfac.experiments.environment import warning
from kronfac.experiments.errors import need
from kronfac.experiments.present import Table, environment_table

_LIBRARY = "charts.js"


def page_html(title: str, parts: Iterable[str], data: Mapping[str, object], script: str) -> str:
    """Put a page together.

    Args:
        title: What the window is called.
        parts: The page from top to bottom, as HTML.
        data: What the script draws, by the id under which it finds it; without NaN.
        script: Name of the script among the assets.

    Returns:
        The whole page, with style, numbers, plotly and script in it.
    """
    plotly = need("plotly.offline", "experiments").get_plotlyjs()
    numbers = "\n".join(
        f'<script type="application/json" id="{escape(name)}">{_numbers(value)}</script>'
        for name, value in data.items()
    )
    body = "\n".join(part for part in parts if part)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} · kronfac</title>
<style>{_asset("report.css")}</style>
</head>
<body>
<main>
{body}
</main>
{numbers}
<script>{plotly}</script>
<script>{_asset(_LIBRARY)}</script>
<script>{_asset(script)}</script>
</body>
</html>
"""


def heading_html(title: str, lead: str, told: Iterable[str] = ()) -> str:
    """Make the top of a page.

    Args:
        title: Its heading.
        lead: A line below it.
        told: Sentences that stand out, if any.

    Returns:
        HTML.
    """
    lines = "".join(f"<li>{escape(line)}</li>" for line in told)
    shown = f'\n<ul class="headlines">{lines}</ul>' if lines else ""
    return f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>{shown}'


def origin_html(environment: Mapping[str, object], command: str) -> str:
    """Say on what, and how, the figures were made.

    Args:
        environment: What `environment.environment` gave.
        command: The command, or the call.

    Returns:
        HTML with two headings of the second order.
    """
    return (
        f"<h2>Environment</h2>\n{table_html(environment_table(environment))}\n{note_html(warning(environment))}\n"
        f"<h2>Command</h2>\n<pre>{escape(command)}</pre>"
    )


def note_html(text: str) -> str:
    """Make a remark.

    Args:
        text: The remark.

    Returns:
        HTML; nothing if there is none.
    """
    return f'<p class="note">{escape(text)}</p>' if text else ""


def table_html(table: Table) -> str:
    """Make a table.

    Args:
        table: The table.

    Returns:
        HTML; it scrolls by itself where the window is narrow.
    """
    kinds = [' class="text"' if index in table.words else "" for index in range(len(table.columns))]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, table.columns, strict=True))
    body = []
    for index, row in enumerate(table.rows):
        mark = f' class="{table.marks[index]}"' if table.marks.get(index) else ""
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        body.append(f"<tr{mark}>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def pictures_html(paths: Iterable[Path]) -> str:
    """Put pictures into the page.

    Args:
        paths: PNG files.

    Returns:
        HTML that holds their contents.
    """
    images = (
        f'<img alt="{escape(path.stem)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in paths
    )
    return f'<div class="pictures">{"".join(images)}</div>'


def _asset(name: str) -> str:
    return (resources.files("kronfac.experiments") / "assets" / name).read_text(encoding="utf-8")


def _numbers(value: object) -> str:
    return json.dumps(value, allow_nan=False).replace("</", "<\\/")
