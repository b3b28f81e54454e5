from __future__ import annotations

import math

import pytest

pytest.importorskip("matplotlib")

from kronfac.plots import scaling_panels


def row(axis: str, size: int, median: float, counted: float) -> dict[str, object]:
    return {
        "axis": axis,
        "size": size,
        "part": "inverse",
        "median": median,
        "low": median,
        "high": median,
        "counted": counted,
    }


def test_a_panel_for_each_axis_with_a_guide_through_the_last_point() -> None:
    rows = [
        row("width", 4, 1.0, 4.0),
        row("width", 2, 0.5, 2.0),
        row("width", 8, math.nan, 8.0),
        row("depth", 1, -1.0, 1.0),
    ]
    width, depth = scaling_panels(rows, about={"width": "wide"})
    assert (width.get_title(loc="left"), depth.get_title(loc="left")) == ("wide", "depth")
    assert (width.get_xscale(), width.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in width.get_xticklabels()] == ["2", "4", "8"]
    measured, guide, missing = width.get_lines()
    assert (list(measured.get_xdata()), list(measured.get_ydata())) == ([2, 4], [0.5, 1.0])
    assert list(guide.get_ydata()) == [0.5, 1.0, 2.0]
    assert (list(missing.get_xdata()), list(missing.get_ydata())) == ([8], [2.0])
    assert len(depth.get_lines()) == 1  # what is below nothing has no guide
    assert width.figure.legends[0].get_texts()[0].get_text() == "inverse"


def test_nothing_measured_is_an_empty_panel_and_no_rows_are_refused() -> None:
    [axes] = scaling_panels([row("width", 2, math.nan, 1.0)])
    assert not axes.get_lines()
    with pytest.raises(ValueError, match="at least one row"):
        scaling_panels([])


def test_the_legend_is_no_wider_than_a_picture_of_one_panel() -> None:
    rows = [row("width", 4, 1.0, 4.0) | {"part": part} for part in ("statistics", "inverse", "precondition")]
    figure = scaling_panels(rows)[0].figure
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
