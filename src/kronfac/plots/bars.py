"""Bars, for figures there is one of per optimiser or layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kronfac.plots.style import colour_of, dress, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def bars(
    names: Sequence[str],
    values: Sequence[float],
    *,
    errors: Sequence[float] | None = None,
    axes: Axes | None = None,
    x_label: str = "",
    title: str | None = None,
    form: str = "{:.3g}",
    among: Sequence[str] | None = None,
) -> Axes:
    """Draw a horizontal bar per name, the first on top, with its value written beside it.

    Args:
        names: What the bars stand for.
        values: Their lengths; a NaN draws no bar and is written as a dash.
        errors: Half-lengths of error bars.
        axes: Where to draw; new axes by default, as high as there are bars.
        x_label: Label of the horizontal axis.
        title: Title, if any.
        form: Format of the values.
        among: All names of the picture, where bars of one name have the same colour in several axes.

    Returns:
        The axes.

    Raises:
        ValueError: If there are not as many values as names.
    """
    if len(names) != len(values):
        raise ValueError(f"bars needs a value per name, got {len(names)} names and {len(values)} values")
    axes = axes if axes is not None else new_axes(6.4, 1.2 + 0.4 * len(names))
    places = range(len(names))
    drawn = axes.barh(
        places,
        values,
        xerr=errors,
        color=[colour_of(name, among or names) for name in names],
        height=0.6,
        ecolor="#444444",
    )
    axes.bar_label(drawn, [form.format(value) if value == value else "" for value in values], padding=4)
    for place, value in zip(places, values, strict=True):
        if value != value:  # matplotlib labels no bar it did not draw
            axes.annotate("–", (0.0, place), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    dress(axes, title, x_label, "")
    axes.grid(False, axis="y")
    return axes
