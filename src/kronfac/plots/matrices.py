"""Matrices as images, rows of them on one scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def matrix_images(
    grid: Sequence[Sequence[Any]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    titles: Sequence[Sequence[str]] = (),
    quantile: float = 0.995,
    size: float = 2.1,
) -> list[list[Axes]]:
    """Draw absolute values as grey levels, white for the largest; the images of a row share their scale.

    Args:
        grid: Rows of square matrices, anything that numpy can read; None leaves a place empty.
        row_labels: A label for each row.
        column_labels: A label for each column.
        titles: A small text below each image.
        quantile: White is this quantile of the absolute values of the row's first matrix, since a few large entries
            would leave everything else black.
        size: Inches of an image.

    Returns:
        The axes, row by row; ``axes[0][0].figure.savefig(path)`` writes the picture.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is nothing to draw, or rows differ in length.
    """
    if not grid or not grid[0] or len({len(row) for row in grid}) > 1:
        raise ValueError("matrix_images needs rows of equally many matrices")
    try:
        import numpy as np
        from matplotlib.figure import Figure
        from matplotlib.ticker import ScalarFormatter
    except ImportError as error:
        raise ImportError("kronfac.plots needs matplotlib: pip install 'kronfac[experiments]'") from error
    figure = Figure(figsize=(size * len(grid[0]) + 0.9, size * len(grid) + 0.5), dpi=150, layout="constrained")
    axes = figure.subplots(len(grid), len(grid[0]), squeeze=False)
    for i, row in enumerate(grid):
        white = _white([matrix for matrix in row if matrix is not None], quantile)
        drawn = None
        for j, matrix in enumerate(row):
            place = axes[i, j]
            place.set_xticks([])
            place.set_yticks([])
            place.spines[:].set_visible(False)
            if matrix is not None:
                values = np.abs(np.asarray(matrix, dtype=float))
                drawn = place.imshow(values, cmap="gray", vmin=0.0, vmax=white, interpolation="antialiased")
            if i == 0 and column_labels:
                place.set_title(column_labels[j], fontsize="medium")
            if j == 0 and row_labels:
                place.set_ylabel(row_labels[i], fontsize="medium")
            if titles and titles[i][j]:
                place.set_xlabel(titles[i][j], fontsize="small")
        if drawn is None:
            continue
        numbers = ScalarFormatter()
        numbers.set_powerlimits((-3, 3))
        bar = figure.colorbar(drawn, ax=list(axes[i]), shrink=0.85, pad=0.01, extend="max", format=numbers)
        bar.ax.tick_params(labelsize="x-small")
        bar.ax.yaxis.get_offset_text().set_fontsize("x-small")
    return [list(row) for row in axes]


def _white(shown: Sequence[Any], quantile: float) -> float:
    """What is white in a row of these matrices."""
    import numpy as np

    if not shown:
        return 1.0
    first = np.abs(np.asarray(shown[0], dtype=float))
    return float(np.quantile(first, quantile)) or float(first.max()) or 1.0
