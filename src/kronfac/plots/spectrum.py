"""Spectra of curvature blocks: eigenvalues in falling order, one pair of axes per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kronfac.plots.style import colour_of, dress

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

#: Of the approximations in order, so that one shows through another that it agrees with.
STYLES = ("-", "--", "-.", ":")
#: Eigenvalues below this fraction of the layer's largest one are rounding, and zeros have no logarithm.
FLOOR = 1e-12


def spectrum_panels(
    table: pd.DataFrame,
    *,
    layers: Sequence[str] | None = None,
    axes: Sequence[Axes] | None = None,
    floor: float = FLOOR,
) -> list[Axes]:
    """Draw the eigenvalues of each layer's block and of its approximations against their rank, both on log scales.

    Args:
        table: A row per eigenvalue with columns ``layer``, ``approximation``, ``index`` (from 0) and ``eigenvalue``.
        layers: The layers in order; that of their first appearance by default.
        axes: Where to draw, one for each layer; new axes side by side by default.
        floor: Eigenvalues below this fraction of the layer's largest one are left out.

    Returns:
        The axes, one for each layer.

    Raises:
        ValueError: If a layer has no rows, or there are not as many axes as layers.
    """
    layers = list(dict.fromkeys(table["layer"])) if layers is None else list(layers)
    if missing := [layer for layer in layers if not (table["layer"] == layer).any()]:
        raise ValueError(f"the table has no eigenvalues of the layers {missing}")
    panels = _side_by_side(len(layers)) if axes is None else list(axes)
    if not layers or len(panels) != len(layers):
        raise ValueError(
            f"spectrum_panels needs one pair of axes per layer, got {len(panels)} for {len(layers)} layers"
        )
    names = list(dict.fromkeys(table["approximation"]))
    for layer, panel in zip(layers, panels, strict=True):
        rows = table[table["layer"] == layer]
        least = floor * rows["eigenvalue"].max()
        for place, name in enumerate(names):
            line = rows[(rows["approximation"] == name) & (rows["eigenvalue"] > least)].sort_values("index")
            # The exact spectrum lies under the others, broad enough to be seen where they agree.
            width, under = (3.5, 1) if place == 0 else (1.5, 2)
            panel.plot(
                line["index"] + 1,
                line["eigenvalue"],
                color=colour_of(name, names),
                label=name,
                linewidth=width,
                linestyle=STYLES[(place - 1) % len(STYLES)] if place else "-",
                zorder=under,
                alpha=0.55 if under == 1 else 1.0,
            )
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.minorticks_off()
        dress(panel, f"layer {layer!r}", "rank", "eigenvalue" if panel is panels[0] else "")
    panels[0].legend(frameon=False)
    return panels


def _side_by_side(number: int) -> list[Axes]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("kronfac.plots needs matplotlib: pip install 'kronfac[experiments]'") from error
    figure = Figure(figsize=(3.6 * max(number, 1), 3.4), dpi=150, layout="constrained")
    return list(figure.subplots(1, max(number, 1), squeeze=False).flat)[:number]
