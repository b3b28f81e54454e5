"""Accuracy on every task after every task, as heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def accuracy_matrices(
    matrices: Sequence[Sequence[Sequence[float]]],
    labels: Sequence[str],
    *,
    title: str | None = None,
    columns: int = 4,
    size: float = 2.6,
) -> list[Axes]:
    """Draw a heat map for each strategy: row i holds the accuracy on each task after task i was learned.

    Args:
        matrices: Square matrices of accuracies from 0 to 1, of one size.
        labels: A label for each; the mean of the last row is added to it.
        title: Title of the picture, if any.
        columns: Heat maps side by side.
        size: Inches of a heat map.

    Returns:
        The axes; ``axes[0].figure.savefig(path)`` writes the picture.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is nothing to draw, or labels and matrices differ in number.
    """
    if not matrices or len(matrices) != len(labels):
        raise ValueError(f"accuracy_matrices needs a label for each matrix, got {len(labels)} for {len(matrices)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("kronfac.plots needs matplotlib: pip install 'kronfac[experiments]'") from error
    width, height = min(columns, len(matrices)), -(-len(matrices) // columns)
    figure = Figure(figsize=(size * width + 0.9, (size + 0.4) * height + 0.3), dpi=150, layout="constrained")
    places = figure.subplots(height, width, squeeze=False).flatten()
    tasks = len(matrices[0])
    for index, (axes, matrix, label) in enumerate(zip(places, matrices, labels, strict=False)):
        drawn = axes.imshow(matrix, cmap="viridis", vmin=0.0, vmax=1.0)
        for i, row in enumerate(matrix if tasks <= 10 else ()):
            for j, value in enumerate(row):
                axes.text(
                    j,
                    i,
                    f"{100 * value:.0f}",
                    ha="center",
                    va="center",
                    fontsize="x-small",
                    color="black" if value > 0.6 else "white",
                )
        mean = sum(matrix[-1]) / tasks
        axes.set_title(f"{label}: {100 * mean:.1f} %", fontsize="small")
        ticks = range(0, tasks, max(1, tasks // 10))
        axes.set_xticks(ticks, [str(tick + 1) for tick in ticks], fontsize="x-small")
        axes.set_yticks(ticks, [str(tick + 1) for tick in ticks], fontsize="x-small")
        axes.set_xlabel("task", fontsize="small")
        if index % width == 0:
            axes.set_ylabel("after task", fontsize="small")
        axes.spines[:].set_visible(False)
    for axes in places[len(matrices) :]:
        axes.set_axis_off()
    bar = figure.colorbar(drawn, ax=list(places), shrink=0.85, pad=0.01)
    bar.set_label("test accuracy", fontsize="small")
    bar.ax.tick_params(labelsize="x-small")
    if title:
        figure.suptitle(title, fontsize="medium", x=0.01, ha="left")
    return list(places[: len(matrices)])
