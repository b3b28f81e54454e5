"""Every run as a thin line, and their mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kronfac.plots.style import COLOURS, dress, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def run_lines(
    lines: Sequence[tuple[Sequence[float], Sequence[float]]],
    *,
    axes: Axes | None = None,
    title: str | None = None,
    x: str = "epochs",
    y: str = "",
    limits: tuple[float, float] | None = None,
) -> Axes:
    """Draw runs one by one, which a band from least to greatest would hide, and their mean where all have come so far.

    Args:
        lines: Positions and values of each run.
        axes: Where to draw; new axes by default.
        title: Title, if any.
        x: Label of the horizontal axis.
        y: Label of the vertical axis.
        limits: Ends of the vertical axis.

    Returns:
        The axes.
    """
    axes = axes if axes is not None else new_axes()
    for positions, values in lines:
        axes.plot(positions, values, color=COLOURS[0], linewidth=0.8, alpha=0.55)
    common = min((len(values) for _, values in lines), default=0)
    if len(lines) > 1 and common:
        mean = [sum(values[i] for _, values in lines) / len(lines) for i in range(common)]
        axes.plot(lines[0][0][:common], mean, color=COLOURS[2], linewidth=1.6)
    if limits is not None:
        axes.set_ylim(*limits)
    return dress(axes, title, x, y)
