"""What a reader of tables, pictures and pages of a comparison is told."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.experiments.test_tables import KFAC, SGD, results

from kronfac.experiments import page
from kronfac.experiments.pictures import _drawn
from kronfac.experiments.present import Table, endings_table, grid_view, reach_view, summary_view
from kronfac.experiments.report import _page
from kronfac.experiments.results import GridPoint, Results
from kronfac.experiments.tables import headlines
from kronfac.experiments.targets import target_view


def with_one_lost(data: Results, optimizer: str, seed: int, status: str = "diverged") -> Results:
    runs = [
        replace(run, status=status, note="diverged at step 3: the loss is nan", evaluations=run.evaluations[:1])
        if (run.settings.optimizer, run.settings.seed) == (optimizer, seed)
        else run
        for run in data.runs
    ]
    return replace(data, runs=runs)


def test_a_ratio_to_nothing_is_a_dash() -> None:
    worse = [(0, 0.0, 2.0), (100, 1.0, 9.0)]  # ends where the other one began
    data = results({("sgd", 0): worse, ("kfac", 0): KFAC})
    assert reach_view(data).rows[1] == ["KFAC", "SGD-momentum's 9", "0", "–", "–", "0.00", "–"]
    everywhere = replace(data, plan=replace(data.plan, targets=(10.0,)))
    assert [row[5] for row in target_view(everywhere).rows] == ["–", "–"]


def test_percentages_are_named_as_such() -> None:
    data = results({("sgd", 0): SGD, ("kfac", 0): KFAC})
    assert summary_view(data).columns[2:6] == ["train loss", "train error [%]", "test loss", "test error [%]"]
    by_error = replace(data, plan=replace(data.plan, metric="test_error"))
    assert headlines(by_error)[0].startswith("KFAC reaches SGD-momentum's final test error (3 %) in ")
    assert "(3)" in headlines(data)[0]


def test_the_page_says_why_a_run_diverged_and_compares_nobody_with_nobody() -> None:
    data = with_one_lost(results({("kfac", 0): KFAC, ("kfac", 1): KFAC}), "kfac", 1)
    assert endings_table(data).rows == [["KFAC", "1", "diverged at step 3: the loss is nan"]]
    text = _page(data, [])
    assert "diverged at step 3: the loss is nan" in text
    assert "reaches what another has" not in text
    assert "Runs that diverged" not in _page(results({("kfac", 0): KFAC}), [])


@pytest.mark.parametrize("status", ["diverged", "unfinished"])
def test_a_run_that_stopped_early_does_not_cut_the_mean_of_the_others_short(status: str) -> None:
    runs = {("sgd", 0): SGD, ("kfac", 0): KFAC, ("sgd", 1): SGD, ("kfac", 1): KFAC}
    table, names = _drawn(with_one_lost(results(runs), "kfac", 1, status))
    assert names == ["SGD-momentum", "KFAC (1 of 2 seeds)"]
    assert list(table[table["optimizer"] == names[1]]["step"]) == [0, 20, 40, 100]
    alone, names = _drawn(with_one_lost(results({("kfac", 0): KFAC}), "kfac", 0, status))
    assert names == ["KFAC"]
    assert list(alone["step"]) == [0]


def test_a_value_that_is_off_in_a_grid_is_named() -> None:
    data = results({("kfac", 0): KFAC})
    points = [GridPoint({"kl_clip": clip}, {"kl_clip": clip}, data.runs[0]) for clip in (None, 0.01)]
    searched = replace(data, plan=replace(data.plan, grid={"kfac": {"kl_clip": [None, 0.01]}}), grids={"kfac": points})
    assert sorted(row[0] for row in grid_view(searched, "kfac").rows) == ["0.01", "none"]


def test_long_cells_are_broken_into_lines_and_empty_headings_left_out() -> None:
    text = page.table_html(Table(["", ""], [["short", "x=1, " * 30]], {0: "bad"}, words=(0, 1)))
    assert '<td class="text">short</td><td class="text long">' in text
    assert "<thead>" not in text
    assert '<th scope="col">n</th>' in page.table_html(Table(["n"], [["1"]], words=()))


def test_no_name_in_the_numbers_can_end_or_begin_an_element() -> None:
    assert "<" not in page._numbers({"name": "<!--<script></script>"})


def test_charts_offer_no_way_to_send_the_numbers_elsewhere() -> None:
    text = _page(results({("kfac", 0): KFAC}), [])
    ours = text[text.index("const charts") :]
    assert "showSendToCloud: false" in ours
    assert not re.findall(r"https?://", ours)


def test_the_command_may_hold_anything(tmp_path: Path) -> None:
    odd = replace(results({("kfac", 0): KFAC}), command="kronfac train --out '<b>&ünï 日本'", folder=tmp_path)
    assert "&lt;b&gt;&amp;ünï 日本" in _page(odd, [])
