"""Training curves with bands over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kronfac.plots.style import colour_of, dress, label, line_of, new_axes, plain_logarithms

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes

_SAMPLES = 400


def training_curves(
    table: pd.DataFrame,
    x: str = "step",
    y: str = "train_loss",
    *,
    names: Sequence[str] | None = None,
    axes: Axes | None = None,
    log_y: bool = True,
    focus: float = 0.0,
    title: str | None = None,
) -> Axes:
    """Draw a metric against steps, epochs or seconds: a line for the mean over seeds, a band from least to greatest.

    Args:
        table: A row per evaluation with columns ``optimizer``, ``seed``, ``x`` and ``y``.
        x: Column of the horizontal axis.
        y: Column of the vertical axis.
        names: The optimisers in order; that of their first appearance by default.
        axes: Where to draw; new axes by default.
        log_y: Whether the vertical axis is logarithmic (only if every value is positive).
        focus: Let the vertical axis end at the greatest value that a run has after this fraction of its evaluations:
            the first ones often dwarf all others, and squeeze them together.
        title: Title, if any.

    Returns:
        The axes.
    """
    axes = axes if axes is not None else new_axes()
    names = list(dict.fromkeys(table["optimizer"])) if names is None else names
    for name in names:
        runs = [run for _, run in table[table["optimizer"] == name].groupby("seed") if len(run)]
        if not runs:
            continue
        positions, mean, low, high = seed_band([run[x].to_numpy() for run in runs], [run[y].to_numpy() for run in runs])
        colour = colour_of(name, names)
        point = "o" if len(positions) == 1 or positions[0] == positions[-1] else ""  # which makes no line
        axes.plot(positions, mean, line_of(name, names), color=colour, label=name, linewidth=1.8, marker=point)
        if len(runs) > 1:
            axes.fill_between(positions, low, high, color=colour, alpha=0.2, linewidth=0)
    logarithmic = log_y and len(table) > 0 and bool((table[y].dropna() > 0).all())
    if logarithmic:
        axes.set_yscale("log")
    if focus:
        axes.set_ylim(top=_greatest_after(table, y, focus))
    if logarithmic:
        plain_logarithms(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return dress(axes, title, label(x), label(y))


def _greatest_after(table: pd.DataFrame, y: str, fraction: float) -> float | None:
    runs = [run[y].iloc[int(fraction * len(run)) :] for _, run in table.groupby(["optimizer", "seed"])]
    return 1.02 * max(run.max() for run in runs) if runs else None


def seed_band(
    xs: Sequence[np.ndarray], ys: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Bring runs to common positions, for seeds take different seconds.

    Args:
        xs: Positions of each run's values, rising.
        ys: The values.

    Returns:
        Positions, mean, least and greatest value there, over the range that all runs cover. Runs that share their
        positions are not interpolated.
    """
    import numpy as np

    if all(len(x) == len(xs[0]) and np.array_equal(x, xs[0]) for x in xs):
        positions, values = xs[0], np.stack(ys)
    else:
        positions = np.linspace(max(x[0] for x in xs), min(x[-1] for x in xs), _SAMPLES)
        values = np.stack([np.interp(positions, x, y) for x, y in zip(xs, ys, strict=True)])
    return positions, values.mean(0), values.min(0), values.max(0)
