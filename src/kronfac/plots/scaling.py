"""How costs grow with a size, on logarithmic axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from kronfac.plots.panels import new_panels
from kronfac.plots.style import colour_of, dress, plain_logarithms

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 3
#: Inches for an entry of the legend, which would otherwise be wider than a picture of one panel, and cut.
_ENTRY = 2.0


def scaling_panels(
    rows: Sequence[Mapping[str, Any]], *, y: str = "over forward+backward", about: Mapping[str, str] | None = None
) -> list[Axes]:
    """Draw a panel for each axis of scaling, with a line for each part.

    Dashed is what was counted, moved to run through the part's last measured point; crosses on it are sizes that were
    not measured.

    Args:
        rows: Each with ``axis``, ``size``, ``part``, ``counted``, and ``median``, ``low``, ``high``, all three NaN if
            it was not measured.
        y: What the figures are.
        about: A title for each axis; its name by default.

    Returns:
        The axes; ``axes[0].figure.savefig(path)`` writes the picture.

    Raises:
        ValueError: If there is nothing to draw.
    """
    names = list(dict.fromkeys(row["axis"] for row in rows))
    if not names:
        raise ValueError("scaling_panels needs at least one row")
    all_parts = list(dict.fromkeys(row["part"] for row in rows))
    panels = new_panels(len(names), columns=_COLUMNS, width=4.2, height=3.4)
    for place, (axes, name) in enumerate(zip(panels, names, strict=True)):
        for part in all_parts:
            line = sorted(
                (row for row in rows if row["axis"] == name and row["part"] == part), key=lambda row: row["size"]
            )
            _draw(axes, line, colour_of(part, all_parts))
        sizes = sorted({row["size"] for row in rows if row["axis"] == name})
        axes.set_xscale("log", base=2)
        positive = any(row["median"] > 0 for row in rows if row["axis"] == name)
        if positive:  # noise in a difference may leave nothing that has a logarithm
            axes.set_yscale("log", nonpositive="mask")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        dress(axes, fill((about or {}).get(name, name), 44), name, "" if place % _COLUMNS else y)
        axes.title.set_fontsize("small")
        if positive:
            plain_logarithms(axes)
    _explain(panels[0], all_parts)
    return panels


def _draw(axes: Axes, line: Sequence[Mapping[str, Any]], colour: str) -> None:
    measured = [row for row in line if row["median"] == row["median"]]
    if not measured:
        return
    sizes = [row["size"] for row in measured]
    axes.fill_between(
        sizes, [row["low"] for row in measured], [row["high"] for row in measured], color=colour, alpha=0.2, linewidth=0
    )
    axes.plot(sizes, [row["median"] for row in measured], color=colour, marker="o", markersize=4, linewidth=1.6)
    last = measured[-1]
    if last["median"] <= 0 or not last["counted"] > 0:
        return
    factor = last["median"] / last["counted"]
    axes.plot(
        [row["size"] for row in line],
        [factor * row["counted"] for row in line],
        color=colour,
        linestyle="--",
        linewidth=0.9,
        alpha=0.8,
    )
    missing = [row for row in line if row["median"] != row["median"]]
    axes.plot(
        [row["size"] for row in missing],
        [factor * row["counted"] for row in missing],
        color=colour,
        marker="x",
        linestyle="none",
    )


def _explain(axes: Axes, parts: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour_of(part, parts), marker="o", markersize=4) for part in parts]
    handles.append(Line2D([], [], color="#444444", linestyle="--", linewidth=0.9))
    handles.append(Line2D([], [], color="#444444", linestyle="none", marker="x"))
    labels = [*parts, "FLOPs, through the last point", "not measured"]
    width = float(axes.figure.get_figwidth())  # type: ignore[union-attr]
    columns = max(1, min(len(labels), int(width / _ENTRY)))
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
