from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from kronfac import plots


def test_curves_have_a_line_for_each_approximation_and_a_dashed_bound() -> None:
    table = pd.DataFrame(
        {
            "step": [0, 10] * 2,
            "approximation": ["kfac"] * 2 + ["tkfac"] * 2,
            "distance_sum": [4.0, 2.0, 3.0, 1.0],
            "bound": [8.0, 6.0, math.nan, math.nan],
        }
    )
    axes = plots.error_curves(table, title="t")
    kfac, bound, tkfac = axes.get_lines()
    assert list(kfac.get_ydata()) == [4.0, 2.0]
    assert list(bound.get_ydata()) == [8.0, 6.0]
    assert (bound.get_linestyle(), bound.get_color()) == ("--", kfac.get_color())
    assert list(tkfac.get_ydata()) == [3.0, 1.0]
    assert axes.get_yscale() == "log"
    assert len(plots.error_curves(table, bound=None).get_lines()) == 2


def test_an_error_of_zero_makes_the_axis_linear_and_refusals_are_left_out() -> None:
    table = pd.DataFrame(
        {"step": [0, 1, 0], "approximation": ["dense", "dense", "refused"], "distance_sum": [0.0, 1.0, math.nan]}
    )
    axes = plots.error_curves(table)
    assert axes.get_yscale() == "linear"
    assert len(axes.get_lines()) == 1


def test_layers_are_in_order_with_a_mark_for_each_approximation() -> None:
    table = pd.DataFrame(
        {"layer": ["a", "b"] * 2, "approximation": ["x", "x", "y", "y"], "error": [0.1, 0.2, 0.3, 0.4]}
    )
    axes = plots.layer_errors(table)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["a", "b"]
    first, second = (np.asarray(drawn.get_offsets()) for drawn in axes.collections)
    assert first[:, 1].tolist() == [0.1, 0.2]
    assert second[:, 1].tolist() == [0.3, 0.4]
    assert (first[:, 0] < second[:, 0]).all()


def test_images_of_a_row_share_a_scale_of_absolute_values() -> None:
    exact = np.arange(16.0).reshape(4, 4) - 8
    axes = plots.matrix_images(
        [[exact, 2 * exact, None], [10 * exact, exact, exact]],
        row_labels=["one", "two"],
        column_labels=["exact", "kfac", "error"],
        titles=[["", "", "refused"], ["", "", ""]],
        quantile=1.0,
    )
    (first,), (second,) = axes[0][0].get_images(), axes[0][1].get_images()
    assert first.get_clim() == second.get_clim() == (0.0, 8.0)
    np.testing.assert_allclose(second.get_array(), np.abs(2 * exact))
    assert axes[1][0].get_images()[0].get_clim() == (0.0, 80.0)
    assert len(axes[0][2].get_images()) == 0
    assert axes[0][2].get_xlabel() == "refused"
    assert [place.get_title() for place in axes[0]] == ["exact", "kfac", "error"]
    assert axes[1][0].get_ylabel() == "two"


def test_ragged_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="equally many"):
        plots.matrix_images([[np.eye(2)], [np.eye(2), np.eye(2)]])
    with pytest.raises(ValueError, match="equally many"):
        plots.matrix_images([])


def test_the_scale_of_a_row_is_that_of_its_first_image() -> None:
    """Places that come before it, or make up the whole row, are empty and leave no scale without numbers."""
    axes = plots.matrix_images([[None, 4 * np.eye(2)], [None, None]], quantile=1.0, row_labels=["one", "none"])
    assert axes[0][1].get_images()[0].get_clim() == (0.0, 4.0)
    assert not any(place.get_images() for place in (axes[0][0], *axes[1]))
    assert axes[1][0].get_ylabel() == "none"


def test_scatters_gives_its_panels_alone_and_draws_no_point_for_none() -> None:
    axes = plots.scatters({**{str(place): [(1.0, 2.0)] for place in range(4)}, "none": []}, "x", "y")
    assert len(axes) == 5
    assert axes[0].lines[0].get_xydata().tolist() == [[1.0, 2.0]]
    assert len(axes[4].lines[0].get_xydata()) == 0
