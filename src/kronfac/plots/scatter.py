"""Two quantities of many runs against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def scatters(
    panels: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, *, columns: int = 4, size: float = 2.5
) -> list[Axes]:
    """Draw a scatter for each label, all with the same axes.

    Args:
        panels: Points by the panel's title.
        x: What the first number of each point is.
        y: What the second number is.
        columns: Panels side by side.
        size: Inches of a panel.

    Returns:
        The axes; ``axes[0].figure.savefig(path)`` writes the picture.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is nothing to draw.
    """
    if not panels:
        raise ValueError("scatters needs a panel at least")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("kronfac.plots needs matplotlib: pip install 'kronfac[experiments]'") from error
    width, height = min(columns, len(panels)), -(-len(panels) // columns)
    figure = Figure(figsize=(size * width + 0.6, size * height + 0.6), dpi=150, layout="constrained")
    places = figure.subplots(height, width, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, (title, points) in zip(places, panels.items(), strict=False):
        axes.plot(
            [point[0] for point in points],
            [point[1] for point in points],
            "o",
            color="#0072b2",
            markersize=4,
            alpha=0.8,
        )
        axes.set_title(title, fontsize="small")
        axes.grid(alpha=0.25)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel(x, fontsize="medium")
    figure.supylabel(y, fontsize="medium")
    return list(places[: len(panels)])
