"""Grids of correlation images, like figures 1 and 2 of Grosse & Martens (2016) and 7 and 8 of Gao et al. (2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ImageRow:
    """One row of a grid.

    Attributes:
        label: What it shows, written at its left.
        images: An image for each column, or None for none.
    """

    label: str
    images: Sequence[np.ndarray | None]


def correlation_images(
    rows: Sequence[ImageRow],
    columns: Sequence[str],
    *,
    title: str | None = None,
    side: float = 1.1,
    extents: Sequence[float] | None = None,
) -> Figure:
    """Draw absolute correlations as images, white for 0 and black for 1, all on one scale.

    Args:
        rows: The rows, from the top; each has an image or None for every column.
        columns: Headings; equal neighbours are written once, over their first column.
        title: Title, if any.
        side: Inches of an image's side.
        extents: For columns of autocorrelations, half the length of an image's side in locations, so that the offset
            zero is marked at its centre; by default images have no axes.

    Returns:
        The figure; ``figure.savefig(path)`` writes the picture.

    Raises:
        ValueError: If a row has more or fewer images than there are columns, or there is no row.
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("kronfac.plots needs matplotlib: pip install 'kronfac[experiments]'") from error
    import numpy as np

    if not rows or any(len(row.images) != len(columns) for row in rows):
        raise ValueError(
            f"correlation_images needs {len(columns)} images in each row, got {[len(row.images) for row in rows]}"
        )
    width, height = 2.3 + side * len(columns), 0.7 + side * len(rows) + (0.3 if title else 0.0)
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    drawn = None
    for line, row in zip(grid, rows, strict=True):
        for column, (axes, image) in enumerate(zip(line, row.images, strict=True)):
            axes.set_xticks([])
            axes.set_yticks([])
            if image is None:
                axes.set_visible(False)
                continue
            shape = None
            if extents is not None:
                reach = extents[column]
                shape = (-reach - 0.5, reach + 0.5, reach + 0.5, -reach - 0.5)
                axes.set_xticks([-reach, 0, reach], [f"{-reach:g}", "0", f"{reach:g}"], fontsize=5)
                axes.tick_params(length=2, pad=1)
            drawn = axes.imshow(np.abs(image), cmap="Greys", vmin=0.0, vmax=1.0, extent=shape, aspect="equal")
        line[0].set_visible(True)
        line[0].set_ylabel(row.label, rotation=0, ha="right", va="center", fontsize="small")
    for column, heading in enumerate(columns):
        if column == 0 or heading != columns[column - 1]:
            grid[0][column].set_visible(True)
            grid[0][column].set_title(heading, fontsize="small", loc="left")
    if drawn is not None:
        figure.colorbar(drawn, ax=grid, shrink=min(1.0, 2.0 / (side * len(rows))), label="|correlation|", aspect=15)
    if title:
        figure.suptitle(title, fontsize="medium", x=0.01, ha="left")
    return figure
