"""Pages of HTML that need nothing else, neither network nor neighbours: what all reports are made of."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from kronfac.experiments.environment import warning
from kronfac.experiments.errors import need
from kronfac.experiments.present import Table, environment_table
from kronfac.plots.style import line_of

_LIBRARY = "charts.js"
_DASHES = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}
#: Characters from which on a cell is broken into lines, where other cells are kept whole and the table scrolls.
_LONG = 60


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


def dash_of(name: str, names: Sequence[str]) -> str:
    """Give a name the dashes of its place in a list, so that names that share a colour are told apart.

    Args:
        name: The name.
        names: All names of the chart, in order.

    Returns:
        What plotly calls the style.
    """
    return _DASHES[line_of(name, names)]


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
    facts, remark = table_html(environment_table(environment)), note_html(_sentence(warning(environment)))
    return f"<h2>Environment</h2>\n{facts}\n{remark}\n<h2>Command</h2>\n<pre>{escape(command)}</pre>"


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
    kinds = ["text" if index in table.words else "" for index in range(len(table.columns))]
    body = []
    for index, row in enumerate(table.rows):
        cells = "".join(_cell(cell, kind) for kind, cell in zip(kinds, row, strict=True))
        body.append(f"<tr{_class(table.marks.get(index, ''))}>{cells}</tr>")
    head = "".join(
        f'<th scope="col"{_class(kind)}>{escape(name)}</th>' for kind, name in zip(kinds, table.columns, strict=True)
    )
    shown = f"<thead><tr>{head}</tr></thead>" if any(table.columns) else ""
    return f'<div class="scroll"><table>{shown}<tbody>{"".join(body)}</tbody></table></div>'


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


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _cell(text: str, kind: str) -> str:
    return f"<td{_class(f'{kind} long'.strip() if len(text) > _LONG else kind)}>{escape(text)}</td>"


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""


def _asset(name: str) -> str:
    return (resources.files("kronfac.experiments") / "assets" / name).read_text(encoding="utf-8")


def _numbers(value: object) -> str:
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")  # no name in it begins or ends an element
