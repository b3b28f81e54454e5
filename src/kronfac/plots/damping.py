"""Damping beside the curvature it is added to, as in Figure 3 of Gao et al. (2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kronfac.plots.panels import new_panels
from kronfac.plots.style import colour_of, dress, new_axes, plain_logarithms

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_WORDS = {
    "input_ratio": "input factor: damping / mean eigenvalue",
    "output_ratio": "output factor: damping / mean eigenvalue",
    "printed_input": "√λ / (tr(δΦ) / d_in)",
    "printed_output": "√λ / (tr(δΨ) / d_out)",
    "trace": "trace of the block",
    "inflation": "trace added / trace of the block",
    "pi": "π",
}
_STYLES = ("-", "--", "-.", ":")
#: Quantities for which 1 means: as much damping as curvature.
_RATIOS = {"input_ratio", "output_ratio", "printed_input", "printed_output", "inflation"}


def damping_curves(
    table: pd.DataFrame,
    column: str = "inflation",
    *,
    rule: str | None = None,
    layers: Sequence[str] | None = None,
    axes: Axes | None = None,
    title: str | None = None,
    legend: bool = True,
) -> Axes:
    """Draw a figure of `kronfac.analysis.LayerDamping` against steps, a line for each layer, on a logarithmic axis.

    Args:
        table: Rows of `kronfac.analysis.damping_during_training`.
        column: The figure.
        rule: The damping rule; the table's first by default.
        layers: The layers, in order; all by default.
        axes: Where to draw; new axes by default.
        title: Title; the figure in words by default.
        legend: Whether to draw one.

    Returns:
        The axes.

    Raises:
        ValueError: If the table has no such rows.
    """
    rule = str(table["rule"].iloc[0]) if rule is None else rule
    part = table[table["rule"] == rule]
    layers = list(dict.fromkeys(part["layer"])) if layers is None else layers
    if not len(part) or not set(layers) <= set(part["layer"]):
        raise ValueError(f"the table has no rows of rule {rule!r} for all of the layers {list(layers)}")
    axes = axes if axes is not None else new_axes()
    for place, layer in enumerate(layers):
        rows = part[part["layer"] == layer].sort_values("step")
        axes.plot(
            rows["step"],
            rows[column],
            color=colour_of(layer, layers),
            linestyle=_STYLES[place // 7 % len(_STYLES)],
            label=layer,
            linewidth=1.4,
        )
    shown = part[part["layer"].isin(list(layers))][column]
    if bool((shown > 0).any()):
        axes.set_yscale("log")
    if column in _RATIOS:
        axes.axhline(1.0, color="#888888", linewidth=0.8)
    if axes.get_yscale() == "log":
        plain_logarithms(axes)
    if legend:
        axes.legend(frameon=False, fontsize="x-small", ncols=max(1, len(layers) // 8), title="layer")
    return dress(axes, _WORDS.get(column, column) if title is None else title, "steps", "")


def damping_panels(
    table: pd.DataFrame,
    *,
    rule: str | None = None,
    layers: Sequence[str] | None = None,
    columns: Sequence[str] = ("input_ratio", "output_ratio", "trace"),
    title: str | None = None,
) -> list[Axes]:
    """Draw several figures beside each other: both factors' ratios and the traces, as Gao et al. do.

    Args:
        table: Rows of `kronfac.analysis.damping_during_training`.
        rule: The damping rule; the table's first by default.
        layers: The layers, in order; all by default.
        columns: The figures.
        title: Title of the whole, if any.

    Returns:
        The axes.
    """
    panels = new_panels(len(columns), columns=3, width=4.0, height=3.4)
    for axes, column in zip(panels, columns, strict=True):
        damping_curves(table, column, rule=rule, layers=layers, axes=axes, legend=False)
    figure = panels[0].figure
    lines, labels = panels[0].get_legend_handles_labels()
    if title:
        figure.suptitle(title, fontsize="medium")
    figure.legend(
        lines,
        labels,
        title="layer",
        loc="outside lower center",
        ncols=min(7, len(labels)),
        frameon=False,
        fontsize="small",
    )
    return panels
