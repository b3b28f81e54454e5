from __future__ import annotations

import math

import pandas as pd
import pytest
from matplotlib.axes import Axes

from kronfac import plots
from kronfac.plots.panels import new_panels

ALIGNMENT = pd.DataFrame(
    [
        (step, method, layer, reference, cosine, method != "gradient" or step == 0)
        for layer, reference in (
            ("0", "block-diagonal"), ("2", "block-diagonal"), ("0", "full"),
            ("all layers", "block-diagonal"), ("all layers", "full"),
        )
        for method, cosine in (("gradient", 0.2), ("kfac:exact", 0.9), ("block-diagonal", 0.95))
        if method != reference
        for step in (0, 10)
    ],
    columns=["step", "method", "layer", "reference", "cosine", "converged"],
)  # fmt: skip
DAMPING = pd.DataFrame(
    [
        (step, layer, rule, 10.0 ** (-step), 0.5 if rule == "factored" else math.nan, 0.3)
        for rule in ("factored", "exact")
        for layer in ("conv", "fc")
        for step in (0, 1, 2)
    ],
    columns=["step", "layer", "rule", "trace", "input_ratio", "inflation"],
)


def test_alignment_draws_a_line_for_each_method_and_hollow_points_where_unconverged() -> None:
    axes = plots.alignment_curves(ALIGNMENT, "all layers", "full")
    assert isinstance(axes, Axes)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["gradient", "kfac:exact", "block-diagonal"]
    lines = {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}
    assert lines["kfac:exact"].get_ydata().tolist() == [0.9, 0.9]
    hollow = [line for line in axes.get_lines() if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert [line.get_xdata().tolist() for line in hollow] == [[10]]
    assert axes.get_ylim()[1] > 1.0


def test_alignment_panels_have_layers_first_and_all_layers_last() -> None:
    panels = plots.alignment_panels(ALIGNMENT, title="net")
    titles = [axes.get_title(loc="left") for axes in panels]
    assert titles == ["layer 0", "layer 2", "all, block-diagonal", "all, full"]
    figure = panels[0].figure
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["gradient", "kfac:exact", "block-diagonal"]
    with pytest.raises(ValueError, match="no rows of layer '9'"):
        plots.alignment_curves(ALIGNMENT, "9")


def test_damping_draws_a_line_for_each_layer_on_a_logarithmic_axis() -> None:
    axes = plots.damping_curves(DAMPING, "trace")
    assert [line.get_label() for line in axes.get_lines()] == ["conv", "fc"]
    assert axes.get_lines()[0].get_ydata().tolist() == [1.0, 0.1, 0.01]
    assert axes.get_yscale() == "log"
    exact = plots.damping_curves(DAMPING, "inflation", rule="exact", layers=["fc"], title="t")
    assert len(exact.get_lines()) == 2  # and the line at 1
    assert exact.get_title(loc="left") == "t"
    with pytest.raises(ValueError, match="no rows of rule 'nope'"):
        plots.damping_curves(DAMPING, rule="nope")
    with pytest.raises(ValueError, match="for all of the layers"):
        plots.damping_curves(DAMPING, layers=["nope"])


def test_damping_panels() -> None:
    panels = plots.damping_panels(DAMPING, columns=("input_ratio", "trace"), title="net")
    assert len(panels) == 2
    assert [text.get_text() for text in panels[0].figure.legends[0].get_texts()] == ["conv", "fc"]


def test_panels_that_are_not_needed_are_not_there() -> None:
    panels = new_panels(5, columns=3)
    assert len(panels) == len(panels[0].figure.axes) == 5
    with pytest.raises(ValueError, match="at least one panel"):
        new_panels(0)
