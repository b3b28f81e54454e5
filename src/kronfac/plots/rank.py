"""Ranks of mini-batches' curvature against the batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kronfac.plots.style import COLOURS, dress, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES = (("batch_ggn", "Gauss-Newton of the batch"), ("batch_sampled", "Fisher at sampled labels"))


def rank_curves(
    rows: Sequence[Mapping[str, int]], *, axes: Axes | None = None, title: str | None = None, logarithmic: bool = True
) -> Axes:
    """Draw ranks with their bounds (dashed), and the rank on all data.

    Args:
        rows: As `kronfac.analysis.monte_carlo_rank` gives them.
        axes: Where to draw; new axes by default.
        title: Title, if any.
        logarithmic: Whether both axes are.

    Returns:
        The axes.

    Raises:
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError("rank_curves needs at least one row")
    axes = axes if axes is not None else new_axes()
    rows = sorted(rows, key=lambda row: row["batch_size"])
    sizes = [row["batch_size"] for row in rows]
    for colour, (column, name) in zip(COLOURS, _LINES, strict=False):
        bounds = [row[f"{column}_bound"] for row in rows]
        axes.plot(sizes, bounds, color=colour, linestyle="--", linewidth=1.2, label=f"{name}: bound")
        axes.plot(sizes, [row[column] for row in rows], color=colour, marker="o", markersize=4, label=name)
    for value, style, name in (
        (rows[0]["all_ggn"], ":", "Gauss-Newton of all data"),
        (rows[0]["parameters"], "-", "parameters"),
    ):
        axes.axhline(value, color=COLOURS[6], linestyle=style, linewidth=1.0, label=name)
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, fontsize="small")
    return dress(axes, title, "examples in the batch", "rank")
