"""Alignment of updates with exact Gauss-Newton ones, as in Figures 5 to 7 of Botev et al. (2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kronfac.plots.panels import new_panels
from kronfac.plots.style import colour_of, dress, line_of, new_axes

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes


def alignment_curves(
    table: pd.DataFrame,
    layer: str = "all layers",
    reference: str = "block-diagonal",
    *,
    names: Sequence[str] | None = None,
    axes: Axes | None = None,
    title: str | None = None,
    legend: bool = True,
) -> Axes:
    """Draw the cosine with an exact update against steps, a line for each method.

    Args:
        table: Rows of `kronfac.analysis.alignment_during_training`.
        layer: The layer, or ``"all layers"``.
        reference: ``"block-diagonal"`` or ``"full"``.
        names: The methods in order, for colours; those of the table by default.
        axes: Where to draw; new axes by default.
        title: Title; the layer and the reference by default.
        legend: Whether to draw one.

    Returns:
        The axes. Hollow points are those whose exact update did not converge.

    Raises:
        ValueError: If the table has no such rows.
    """
    part = table[(table["layer"] == layer) & (table["reference"] == reference)]
    if not len(part):
        raise ValueError(f"the table has no rows of layer {layer!r} with reference {reference!r}")
    axes = axes if axes is not None else new_axes()
    names = list(dict.fromkeys(table["method"])) if names is None else names
    for name in names:
        rows = part[part["method"] == name].sort_values("step")
        if not len(rows):
            continue
        colour = colour_of(name, names)
        axes.plot(rows["step"], rows["cosine"], line_of(name, names), color=colour, label=name, linewidth=1.6)
        for done, face in ((True, colour), (False, "white")):
            points = rows[rows["converged"] == done]
            axes.plot(
                points["step"], points["cosine"], linestyle="", marker="o", markersize=3, color=colour,
                markerfacecolor=face,
            )  # fmt: skip
    low = part["cosine"].min()
    axes.set_ylim(min(0.0, low * 1.05) if low == low else 0.0, 1.02)
    if legend:
        axes.legend(frameon=False, fontsize="small")
    return dress(axes, f"{layer}, {reference}" if title is None else title, "steps", "cosine")


def alignment_panels(table: pd.DataFrame, *, title: str | None = None) -> list[Axes]:
    """Draw one panel per layer against the block-diagonal update, and one for all layers against each reference.

    Args:
        table: Rows of `kronfac.analysis.alignment_during_training`.
        title: Title of the figure, if any.

    Returns:
        The axes: the layers in the table's order, then all layers.
    """
    names = list(dict.fromkeys(table["method"]))
    pairs = list(dict.fromkeys(zip(table["layer"], table["reference"], strict=True)))
    whole = [(layer, reference) for layer, reference in pairs if layer == "all layers"]
    single = [(layer, ref) for layer, ref in pairs if layer != "all layers" and ref == "block-diagonal"]
    panels = new_panels(len(single) + len(whole))
    for axes, (layer, reference) in zip(panels, single + whole, strict=True):
        heading = f"all, {reference}" if layer == "all layers" else f"layer {layer}"
        alignment_curves(table, layer, reference, names=names, axes=axes, title=heading, legend=False)
    handles: dict[str, Artist] = {}
    for axes in panels:
        lines, labels = axes.get_legend_handles_labels()
        handles.update(zip(labels, lines, strict=True))
    figure = panels[0].figure
    if title:
        figure.suptitle(title, fontsize="medium")
    figure.legend(
        [handles[name] for name in names if name in handles],
        [name for name in names if name in handles],
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize="small",
    )
    return panels
