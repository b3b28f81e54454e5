"""Several axes in one figure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def new_panels(number: int, columns: int = 4, width: float = 3.0, height: float = 2.4) -> list[Axes]:
    """Make a figure with several pairs of axes, without touching pyplot's state or any display.

    Args:
        number: How many.
        columns: How many beside each other at most.
        width: Inches of each.
        height: Inches of each.

    Returns:
        The axes, row by row; ``axes[0].figure.savefig(path)`` writes the picture.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If a number is not positive.
    """
    if number < 1 or columns < 1:
        raise ValueError(f"new_panels needs at least one panel and column, got {number} and {columns}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("kronfac.plots needs matplotlib: pip install 'kronfac[experiments]'") from error
    columns = min(columns, number)
    rows = math.ceil(number / columns)
    figure = Figure(figsize=(width * columns, height * rows), dpi=150, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    axes = list(grid.flat)
    for unused in axes[number:]:
        unused.remove()
    return axes[:number]
