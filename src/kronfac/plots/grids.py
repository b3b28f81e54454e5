"""What a grid of hyper-parameters looked like."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kronfac.plots.style import COLOURS, dress, label, new_axes, plain_logarithms

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from matplotlib.axes import Axes

_TICKS = 7


def grid_profile(
    table: pd.DataFrame,
    name: str,
    y: str = "final",
    *,
    searched: bool = False,
    axes: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Draw the final metric against one hyper-parameter: all points, and a line through the best for each value.

    Args:
        table: A row per point with columns ``name`` and ``y``; a NaN in ``y`` (diverged) is marked at the top edge.
        name: Column of the hyper-parameter.
        y: Column of the final metric.
        searched: Whether the points are those of a search, in which hardly a value comes twice: the best one of all is
            marked in place of the line.
        axes: Where to draw; new axes by default.
        title: Title, if any.

    Returns:
        The axes.
    """
    import pandas as pd

    axes = axes if axes is not None else new_axes(4.8, 3.6)
    fine, failed = table.dropna(subset=[y]), table[table[y].isna()]
    numeric = pd.to_numeric(table[name], errors="coerce").notna().all()
    place = (lambda column: pd.to_numeric(column)) if numeric else _words
    axes.scatter(place(table[name]), table[y].fillna(fine[y].mean()), alpha=0.0)  # diverged values widen the axis too
    axes.scatter(place(fine[name]), fine[y], s=18, color=COLOURS[5], zorder=2, label="points")
    best = fine.nsmallest(1, y) if searched else fine.groupby(name, dropna=False)[y].min().reset_index()
    what = "best" if searched else "best at this value"
    axes.plot(place(best[name]), best[y], color=COLOURS[0], marker="o", markersize=4, zorder=3, label=what)
    if numeric:
        _number_line(axes, sorted(set(pd.to_numeric(table[name]))), searched)
    if len(fine) and (fine[y] > 0).all():
        axes.set_yscale("log")
        plain_logarithms(axes)
    if len(failed):
        top, edge = [0.98] * len(failed), axes.get_xaxis_transform()
        axes.scatter(place(failed[name]), top, transform=edge, marker="x", color=COLOURS[2], label="diverged")
    axes.legend(frameon=False, fontsize="small")
    return dress(axes, title, name, label(y))


def _number_line(axes: Axes, values: Sequence[float], searched: bool) -> None:
    if values[0] > 0:
        axes.set_xscale("log")
    if not searched and len(values) <= _TICKS:  # what was tried, and nothing between
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.xaxis.minorticks_off()
    elif values[0] > 0:
        plain_logarithms(axes, "x")


def _words(column: pd.Series) -> list[str]:
    """Values that are no numbers, or not all of them: an option that is off among them is missing in the table."""
    return ["none" if v is None or v != v else f"{v:g}" if isinstance(v, float) else str(v) for v in column]
