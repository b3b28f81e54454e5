"""What a measurement of scaling leaves behind, after each point: points to go on from, tables and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from kronfac.experiments.bench.families import BASE, FAMILIES, get_family
from kronfac.experiments.bench.parts import BOUNDED
from kronfac.experiments.bench.scaling import Point
from kronfac.experiments.bench.timing import Spread
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.files import read_json, write_csv, write_json, write_text
from kronfac.experiments.pictures import save_figure
from kronfac.experiments.present import Table, as_markdown, number

POINTS, CSV, MARKDOWN, PICTURE = "scaling.json", "scaling.csv", "scaling.md", "scaling.png"
_MS = f"{BASE}, ms"
#: Points from the largest down over which growth is fitted.
_FITTED = 3


def read_points(folder: Path, setting: Mapping[str, object]) -> list[Point]:
    """Read the points of an earlier call.

    Args:
        folder: Where it wrote.
        setting: How points are measured now.

    Returns:
        The points; none if there is no file.

    Raises:
        ExperimentError: The file is damaged, or its points were measured in another way.
    """
    path = folder / POINTS
    if not path.exists():
        return []
    found = read_json(path)
    before = found.get("setting")
    if not isinstance(before, dict) or not isinstance(found.get("points"), list):
        raise ExperimentError(f"{path} holds no points; delete it to start anew")
    for name, value in setting.items():
        if before.get(name) != value:
            raise ExperimentError(
                f"{path} was measured with {name} {before.get(name)!r}, not {value!r}; choose another --out, or --fresh"
            )
    try:
        return [Point.from_dict(value) for value in found["points"]]  # type: ignore[attr-defined]
    except (KeyError, TypeError) as error:
        raise ExperimentError(f"{path} is damaged; delete it to start anew") from error


def merged(points: Sequence[Point], known: Sequence[Point]) -> list[Point]:
    """Put new points beside those of earlier calls.

    Args:
        points: New ones.
        known: Of earlier calls.

    Returns:
        All of them, by axis and size; of two of the same size the new one.
    """
    places = list(FAMILIES)
    both = {(point.axis, point.size): point for point in (*known, *points)}
    return sorted(both.values(), key=lambda point: (places.index(point.axis), point.size))


def rows_of(points: Sequence[Point], wanted: Sequence[str] = BOUNDED) -> list[dict[str, object]]:
    """Lay points out, a row for each part.

    Args:
        points: The points.
        wanted: The parts.

    Returns:
        Rows: ``axis``, ``size``, ``part``, ``median``, ``low``, ``high``, ``counted`` (FLOPs over those of forward and
        backward), ``rounds`` and ``skipped``; NaN where nothing was measured or is counted.
    """
    rows: list[dict[str, object]] = []
    for point in points:
        for part in (_MS, *wanted):
            spread = point.rows.get(part)
            middle, low, high = (spread.median, spread.low, spread.high) if spread else (math.nan,) * 3
            rows.append(
                {
                    "axis": point.axis,
                    "size": point.size,
                    "part": part,
                    "median": middle,
                    "low": low,
                    "high": high,
                    "counted": point.counted.get(part, math.nan),
                    "rounds": point.rounds,
                    "skipped": point.skipped,
                }
            )
    return rows


def view(points: Sequence[Point], axis: str, wanted: Sequence[str] = BOUNDED) -> Table:
    """Show the points of an axis.

    Args:
        points: The points.
        axis: The axis.
        wanted: The parts.

    Returns:
        A row for each point with medians and quartiles, what was counted in brackets; a last one with the growth.
    """
    own = [point for point in points if point.axis == axis]
    rows: list[list[str]] = []
    marks = {}
    for point in own:
        if not point.rows:
            marks[len(rows)] = "bad"
        cells = [_spread(point.rows.get(part)) for part in (_MS, *wanted)]
        cells[1:] = [
            f"{cell} [{number(point.counted.get(part, math.nan), '.3g')}]"
            for cell, part in zip(cells[1:], wanted, strict=True)
        ]
        rows.append([str(point.size), *cells, str(point.rounds) if point.rows else f"skipped: {point.skipped}"])
    rows.append(["growth", number(_growth(own, _MS), ".2f"), *(_both(own, part) for part in wanted), ""])
    return Table([axis, _MS, *wanted, "rounds"], rows, marks, words=())


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    middle, low, high = (f"{value:.3g}" for value in (spread.median, spread.low, spread.high))
    return f"{middle} ({low} to {high})"


def _both(points: Sequence[Point], part: str) -> str:
    return f"{number(_growth(points, part), '.2f')} [{number(_growth(points, part, counted=True), '.2f')}]"


def _growth(points: Sequence[Point], part: str, counted: bool = False) -> float:
    """Fit the power of the size over the last points, by least squares of logarithms; NaN for fewer than two."""
    last = [point for point in points if point.rows][-_FITTED:]
    pairs = [(p.size, p.counted[part] if counted else p.rows[part].median) for p in last]
    logs = [(math.log(size), math.log(value)) for size, value in pairs if value > 0]
    if len(logs) < 2:
        return math.nan
    x, y = (sum(column) / len(pairs) for column in zip(*logs, strict=True))
    return sum((a - x) * (b - y) for a, b in logs) / sum((a - x) ** 2 for a, _ in logs)


def write_points(
    folder: Path,
    points: Sequence[Point],
    setting: Mapping[str, object],
    machine: Mapping[str, object],
    wanted: Sequence[str] = BOUNDED,
) -> list[Path]:
    """Write everything there is so far.

    Args:
        folder: An existing folder.
        points: The points, at least one.
        setting: How they are measured.
        machine: On what.
        wanted: The parts.

    Returns:
        The files.
    """
    from kronfac.plots import scaling_panels

    axes = list(dict.fromkeys(point.axis for point in points))
    content = {"setting": dict(setting), "machine": dict(machine), "points": [point.as_dict() for point in points]}
    write_json(folder / POINTS, content)
    rows = rows_of(points, wanted)
    write_csv(folder / CSV, rows)
    about = {axis: get_family(axis).about for axis in axes}
    tables = [
        f"**{axis.capitalize()}**: {title}\n\n{as_markdown(view(points, axis, wanted))}"
        for axis, title in about.items()
    ]
    write_text(folder / MARKDOWN, "\n".join([_about(setting), *tables]))
    drawn = [row for row in rows if row["part"] != _MS]
    save_figure(scaling_panels(drawn, about=about)[0], folder / PICTURE)
    return [folder / name for name in (POINTS, CSV, MARKDOWN, PICTURE)]


def _about(setting: Mapping[str, object]) -> str:
    facts = [f"{name} {setting[name]}" for name in ("torch", "precision", "threads", "clock") if name in setting]
    place = f"{setting['processor']}, " if "processor" in setting else ""
    return (
        "Over forward+backward of the same network and batch: medians with quartiles, and in square brackets the ratio "
        f"of FLOPs. *Growth* is the power of the size over the last three points measured. {place}{', '.join(facts)}.\n"
    )
