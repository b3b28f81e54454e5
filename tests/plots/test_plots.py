from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from kronfac import plots
from kronfac.plots.curves import seed_band

TABLE = pd.DataFrame(
    {
        "optimizer": ["SGD"] * 6 + ["KFAC"] * 3,
        "seed": [0, 0, 0, 1, 1, 1, 0, 0, 0],
        "step": [0, 10, 20] * 3,
        "seconds": [0.0, 1.0, 2.0, 0.0, 1.5, 3.0, 0.0, 2.0, 4.0],
        "train_loss": [8.0, 4.0, 2.0, 8.0, 6.0, 4.0, 8.0, 2.0, 1.0],
    }
)


def test_curves_draw_the_mean_and_a_band_from_least_to_greatest() -> None:
    axes = plots.training_curves(TABLE)
    assert isinstance(axes, Axes)
    sgd, kfac = axes.get_lines()
    assert sgd.get_xdata().tolist() == [0, 10, 20]
    assert sgd.get_ydata().tolist() == [8.0, 5.0, 3.0]
    assert kfac.get_ydata().tolist() == [8.0, 2.0, 1.0]
    assert len(axes.collections) == 1  # a band for the optimiser with two seeds alone
    corners = axes.collections[0].get_paths()[0].vertices
    assert corners[:, 1].min() == 2.0
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["SGD", "KFAC"]
    assert axes.get_ylabel() == "training loss"


def test_curves_draw_on_given_axes_and_focus_on_what_comes_later() -> None:
    axes = plots.new_axes()
    assert plots.training_curves(TABLE, axes=axes, focus=0.4, log_y=False, title="t") is axes
    assert axes.get_ylim()[1] == pytest.approx(1.02 * 6.0)  # the greatest of the second and third evaluations
    assert axes.get_yscale() == "linear"


def test_runs_with_other_seconds_are_brought_to_common_ones() -> None:
    axes = plots.training_curves(TABLE, "seconds")
    x = axes.get_lines()[0].get_xdata()
    assert (x[0], x[-1]) == (0.0, 2.0)  # what both seeds cover
    positions, mean, low, high = seed_band(
        [np.array([0.0, 1.0]), np.array([0.0, 2.0])], [np.array([0.0, 1.0]), np.array([4.0, 0.0])]
    )
    middle = len(positions) // 2
    assert low[middle] <= mean[middle] <= high[middle]
    assert mean[-1] == pytest.approx((1.0 + 2.0) / 2)


def test_an_optimiser_keeps_its_colour_when_another_is_missing() -> None:
    names = ["SGD", "KFAC"]
    alone = plots.training_curves(TABLE[TABLE["optimizer"] == "KFAC"], names=names).get_lines()[0]
    both = plots.training_curves(TABLE, names=names).get_lines()[1]
    assert alone.get_color() == both.get_color()


def test_an_empty_table_gives_empty_axes() -> None:
    assert plots.training_curves(TABLE.iloc[:0]).get_lines() == []


def test_bars_have_the_lengths_given() -> None:
    axes = plots.bars(["a", "b", "c"], [1.0, 2.0, math.nan], x_label="seconds")
    assert [bar.get_width() for bar in axes.patches][:2] == [1.0, 2.0]
    assert {text.get_text() for text in axes.texts} == {"1", "2", "", "–"}
    with pytest.raises(ValueError, match="2 names and 1 values"):
        plots.bars(["a", "b"], [1.0])


def test_bars_of_one_name_have_one_colour_in_several_axes() -> None:
    among = ["a", "b", "c"]
    first, second = (plots.bars(names, [1.0, 2.0], among=among) for names in (["a", "c"], ["b", "c"]))
    assert first.patches[1].get_facecolor() == second.patches[1].get_facecolor()
    assert first.patches[0].get_facecolor() != second.patches[0].get_facecolor()


def test_a_grid_shows_best_points_and_divergence() -> None:
    table = pd.DataFrame({"lr": [0.1, 0.1, 1.0, 10.0], "final": [2.0, 1.0, 3.0, math.nan]})
    axes = plots.grid_profile(table, "lr")
    line = axes.get_lines()[0]
    assert line.get_xdata().tolist() == [0.1, 1.0]
    assert line.get_ydata().tolist() == [1.0, 3.0]
    assert "diverged" in [text.get_text() for text in axes.get_legend().get_texts()]
    low, high = axes.get_xlim()
    assert low < 0.1
    assert high > 10.0


def test_points_of_a_search_have_no_line_but_a_best_one() -> None:
    table = pd.DataFrame({"lr": [0.1, 0.03, 0.2, 0.5], "final": [3.0, 1.0, 2.0, math.nan]})
    axes = plots.grid_profile(table, "lr", searched=True)
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[0.03, 1.0]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["points", "best", "diverged"]


def test_a_grid_over_words_is_drawn_in_words() -> None:
    axes = plots.grid_profile(pd.DataFrame({"source": ["sampled", "exact"], "final": [2.0, 1.0]}), "source")
    assert axes.get_xscale() == "linear"


@pytest.mark.parametrize("dtype", [object, float])
def test_a_grid_over_numbers_and_none_is_drawn_in_words(dtype: type) -> None:
    table = pd.DataFrame({"clip": pd.Series([None, 16.0, 0.5, None], dtype=dtype), "final": [2.0, 1.0, math.nan, 3.0]})
    axes = plots.grid_profile(table, "clip")
    axes.figure.canvas.draw()
    assert [text.get_text() for text in axes.get_xticklabels()] == ["none", "16", "0.5"]
    line = axes.get_lines()[0]
    assert dict(zip(line.get_xdata().tolist(), line.get_ydata().tolist(), strict=True)) == {"16": 1.0, "none": 2.0}


def test_correlations_are_drawn_on_one_scale() -> None:
    row = plots.ImageRow("layer", [np.array([[1.0, -0.5], [-0.5, 1.0]]), None])
    figure = plots.correlation_images([row, row], ["a", "a"], title="t", extents=[0.5, 0.5])
    images = [image for axes in figure.axes for image in axes.get_images()]
    assert len(images) == 2
    assert all(image.get_clim() == (0.0, 1.0) for image in images)
    assert images[0].get_array().min() == 0.5  # absolute values
    assert [axes.get_title(loc="left") for axes in figure.axes[:4]] == ["a", "", "", ""]
    with pytest.raises(ValueError, match=r"2 images in each row, got \[1\]"):
        plots.correlation_images([plots.ImageRow("x", [None])], ["a", "b"])


def test_names_that_share_a_colour_have_other_lines() -> None:
    names = [f"method {i}" for i in range(9)]
    table = pd.concat([TABLE[TABLE["optimizer"] == "KFAC"].assign(optimizer=name) for name in names])
    lines = plots.training_curves(table).get_lines()
    assert lines[0].get_color() == lines[7].get_color()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 9


def test_a_run_with_one_evaluation_is_seen() -> None:
    assert plots.training_curves(TABLE[TABLE["step"] == 0]).get_lines()[0].get_marker() == "o"
    assert plots.training_curves(TABLE).get_lines()[0].get_marker() in ("", "None")


def test_a_grid_has_the_values_tried_on_its_axis() -> None:
    table = pd.DataFrame({"lr": [0.05, 0.1, 0.3], "train_loss": [1.0, 2.0, 3.0]})
    axes = plots.grid_profile(table, "lr", "train_loss")
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.05", "0.1", "0.3"]
    assert list(axes.get_xticks(minor=True)) == []
    signed = plots.grid_profile(table.assign(lr=[0.0, 0.1, 0.3]), "lr", "train_loss")
    assert signed.get_xscale() == "linear"
