"""Approximation errors: while a network is trained, and layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kronfac.plots.style import colour_of, dress, new_axes, plain_logarithms

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_MARKERS = "osD^vPX*"


def error_curves(
    table: pd.DataFrame,
    y: str = "distance_sum",
    *,
    names: Sequence[str] | None = None,
    bound: str | None = "bound",
    axes: Axes | None = None,
    log_y: bool = True,
    y_label: str = "Frobenius error, summed over layers",
    title: str | None = None,
) -> Axes:
    """Draw an error against steps of training, a line for each approximation; bounds are dashed, in its colour.

    Args:
        table: A row for each step and approximation with columns ``step``, ``approximation`` and ``y``.
        y: Column of the error.
        names: The approximations in order; that of their first appearance by default.
        bound: Column of bounds on the error; None draws none, and so does a column without values.
        axes: Where to draw; new axes by default.
        log_y: Whether the vertical axis is logarithmic.
        y_label: Label of the vertical axis.
        title: Title, if any.

    Returns:
        The axes.
    """
    axes = axes if axes is not None else new_axes()
    names = list(dict.fromkeys(table["approximation"])) if names is None else names
    least = math.inf
    for index, name in enumerate(names):
        rows = table[table["approximation"] == name].dropna(subset=[y])
        if not len(rows):
            continue
        # Colours repeat after the seventh name; line styles then tell the two apart.
        colour, style = colour_of(name, names), "-" if index < 7 else (0, (3, 1, 1, 1))
        axes.plot(rows["step"], rows[y], color=colour, linestyle=style, label=name, linewidth=1.8)
        least = min(least, rows[y].min())
        limits = rows.dropna(subset=[bound]) if bound is not None and bound in rows else rows.iloc[:0]
        if len(limits):
            axes.plot(limits["step"], limits[bound], color=colour, linestyle="--", linewidth=1, label=f"{name}, bound")
    if log_y and axes.lines and least > 0:
        axes.set_yscale("log")
        plain_logarithms(axes)
    if axes.lines:
        _legend_beside(axes)
    return dress(axes, title, "steps", y_label)


def layer_errors(
    table: pd.DataFrame,
    y: str = "error",
    *,
    names: Sequence[str] | None = None,
    axes: Axes | None = None,
    y_label: str = "relative Frobenius error",
    title: str | None = None,
) -> Axes:
    """Draw the error of every layer, a mark for each approximation.

    Args:
        table: A row for each layer and approximation with columns ``layer``, ``approximation`` and ``y``.
        y: Column of the error.
        names: The approximations in order; that of their first appearance by default.
        axes: Where to draw; new axes by default, as wide as there are layers.
        y_label: Label of the vertical axis.
        title: Title, if any.

    Returns:
        The axes.
    """
    layers = list(dict.fromkeys(table["layer"]))
    axes = axes if axes is not None else new_axes(max(5.0, 2.0 + 0.45 * len(layers)))
    names = list(dict.fromkeys(table["approximation"])) if names is None else names
    width = 0.7 / max(1, len(names))
    for index, name in enumerate(names):
        rows = table[table["approximation"] == name].dropna(subset=[y])
        places = [layers.index(layer) + (index - (len(names) - 1) / 2) * width for layer in rows["layer"]]
        if places:
            mark = _MARKERS[index % len(_MARKERS)]
            colour = colour_of(name, names)
            axes.scatter(places, rows[y], s=22, marker=mark, color=colour, label=name, zorder=2, clip_on=False)
    axes.set_xticks(
        range(len(layers)), layers, rotation=45 if len(layers) > 6 else 0, ha="right" if len(layers) > 6 else "center"
    )
    axes.set_ylim(bottom=0)
    if axes.collections:
        _legend_beside(axes)
    return dress(axes, title, "layer", y_label)


def _legend_beside(axes: Axes) -> None:
    """There are too many names for a place inside the picture that no line crosses."""
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
