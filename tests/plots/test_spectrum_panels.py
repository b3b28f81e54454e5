from __future__ import annotations

import pandas as pd
import pytest
from matplotlib.axes import Axes

from kronfac import plots

TABLE = pd.DataFrame(
    [
        ("a", "exact", 0, 4.0),
        ("a", "exact", 1, 1.0),
        ("a", "exact", 2, 0.0),
        ("a", "kfac", 0, 5.0),
        ("a", "kfac", 1, 1e-15),
        ("b", "exact", 0, 1.0),
    ],
    columns=["layer", "approximation", "index", "eigenvalue"],
)


def test_a_panel_per_layer_with_a_line_per_approximation() -> None:
    panels = plots.spectrum_panels(TABLE)
    assert all(isinstance(panel, Axes) for panel in panels)
    assert [panel.get_title(loc="left") for panel in panels] == ["layer 'a'", "layer 'b'"]
    assert {panel.get_yscale() for panel in panels} == {"log"}
    exact, kfac = panels[0].get_lines()
    assert (exact.get_xdata().tolist(), exact.get_ydata().tolist()) == ([1, 2], [4.0, 1.0])  # a zero has no logarithm
    assert (kfac.get_xdata().tolist(), kfac.get_ydata().tolist()) == ([1], [5.0])  # and rounding is not shown
    assert [text.get_text() for text in panels[0].get_legend().get_texts()] == ["exact", "kfac"]
    assert panels[0].get_lines()[0].get_color() == panels[1].get_lines()[0].get_color()


def test_given_axes_and_layers_are_used() -> None:
    axes = plots.new_axes()
    assert plots.spectrum_panels(TABLE, layers=["b"], axes=[axes]) == [axes]
    assert axes.get_lines()[0].get_ydata().tolist() == [1.0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no eigenvalues of the layers \['c'\]"):
        plots.spectrum_panels(TABLE, layers=["a", "c"])
    with pytest.raises(ValueError, match="got 1 for 2 layers"):
        plots.spectrum_panels(TABLE, axes=[plots.new_axes()])
