from __future__ import annotations

import math
from pathlib import Path

import pytest

from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.plan import make_plan
from kronfac.experiments.present import reach_view, summary_view
from kronfac.experiments.problems import get_problem
from kronfac.experiments.results import Results, RunResult
from kronfac.experiments.tables import curves, headlines, reaches, summary

METRICS = ("train_loss", "train_error", "test_loss", "test_error")


def results(
    runs: dict[tuple[str, int], list[tuple[int, float, float]]],
    diverged: tuple[str, ...] = (),
    unfinished: tuple[str, ...] = (),
) -> Results:
    names = list(dict.fromkeys(name for name, _ in runs))
    seeds = sorted({seed for _, seed in runs})
    plan = make_plan(get_problem("digits-mlp"), names, steps=100, seeds=seeds, examples=1500)
    built = []
    for (name, seed), points in runs.items():
        evaluations = [
            {"step": step, "epoch": step / 15, "seconds": seconds, **dict.fromkeys(METRICS, value)}
            for step, seconds, value in points
        ]
        settings = plan.settings(name, plan.hyperparameters[name], seed)
        status = "diverged" if name in diverged else "unfinished" if name in unfinished else "done"
        built.append(RunResult(settings, status, "", evaluations))
    chosen = {name: dict(plan.hyperparameters[name]) for name in names}
    return Results(Path("nowhere"), plan, {}, "", {}, chosen, built)


SGD = [(0, 0.0, 9.0), (50, 1.0, 4.0), (80, 1.6, 3.0), (100, 2.0, 3.0)]
KFAC = [(0, 0.0, 9.0), (20, 1.0, 3.5), (40, 2.0, 2.0), (100, 5.0, 1.0)]


def test_ratios_are_to_the_first_time_the_other_had_its_own_final_value() -> None:
    table = reaches(results({("sgd", 0): SGD, ("kfac", 0): KFAC}))
    row = table[table["optimizer"] == "KFAC"].iloc[0]
    assert row["target"] == 3.0
    assert row["steps"] == 40
    assert row["steps_ratio"] == 0.5  # of 80, not of 100: at 80 SGD had its final value already
    assert row["seconds_ratio"] == 2.0 / 1.6
    back = table[table["optimizer"] == "SGD-momentum"].iloc[0]
    assert back["reached"] == 0
    assert math.isnan(back["steps_ratio"])


def test_seeds_are_matched_and_one_that_misses_is_counted() -> None:
    slow = [(0, 0.0, 9.0), (100, 5.0, 4.0)]
    data = results({("sgd", 0): SGD, ("kfac", 0): KFAC, ("sgd", 1): SGD, ("kfac", 1): slow})
    row = reaches(data)[lambda t: t["optimizer"] == "KFAC"].iloc[0]
    assert (row["reached"], row["seeds"]) == (1, 2)
    assert math.isnan(row["steps"])
    assert any("1 of 2 seeds" in cell for cells in reach_view(data).rows for cell in cells)
    assert headlines(data) == ["KFAC reaches SGD-momentum's final training loss for 1 of 2 seeds"]


def test_the_summary_compares_at_equal_seconds() -> None:
    table = summary(results({("sgd", 0): SGD, ("kfac", 0): KFAC})).set_index("optimizer")
    assert table.loc["KFAC", "equal_seconds"] == 2.0
    assert table.loc["KFAC", "at_equal_seconds"] == 2.0
    assert table.loc["SGD-momentum", "at_equal_seconds"] == 3.0
    assert table.loc["KFAC", "ms_per_step"] == 50.0
    assert table.loc["KFAC", "train_error"] == 1.0


def test_the_headline_speaks_of_the_best() -> None:
    assert headlines(results({("sgd", 0): SGD, ("kfac", 0): KFAC})) == [
        "KFAC reaches SGD-momentum's final training loss (3) in 0.50 of its steps and 1.25 of its seconds"
    ]
    assert headlines(results({("sgd", 0): KFAC, ("kfac", 0): SGD}))[0].startswith("SGD-momentum reaches KFAC's")


def test_the_headline_names_an_end_no_better_than_the_start() -> None:
    worse = [(0, 0.0, 9.0), (100, 2.0, 9.5)]
    assert headlines(results({("sgd", 0): worse, ("kfac", 0): KFAC})) == [
        "KFAC reaches SGD-momentum's final training loss (9.5), which SGD-momentum had before its first step"
    ]


def test_an_unfinished_run_has_no_end_to_be_reached() -> None:
    runs = {("sgd", 0): SGD, ("adam", 0): SGD, ("kfac", 0): KFAC}
    data = results(runs, unfinished=("sgd",))
    assert set(reaches(data)["target_of"]) == {"Adam", "KFAC"}
    assert [line.split(" final")[0] for line in headlines(data)] == ["KFAC reaches Adam's"]
    assert headlines(results(runs, unfinished=("sgd", "kfac"))) == []


def test_diverged_runs_enter_no_mean_and_set_no_target() -> None:
    data = results({("sgd", 0): SGD, ("kfac", 0): KFAC}, diverged=("kfac",))
    table = summary(data).set_index("optimizer")
    assert math.isnan(table.loc["KFAC", "train_loss"])
    assert table.loc["SGD-momentum", "equal_seconds"] == 2.0
    assert "KFAC" not in set(reaches(data)["target_of"])
    assert summary_view(data).marks == {1: "bad"}


def test_curves_list_every_evaluation() -> None:
    table = curves(results({("sgd", 0): SGD, ("kfac", 0): KFAC}))
    assert len(table) == 8
    assert get_optimizer("kfac").title in set(table["optimizer"])


@pytest.mark.parametrize("view", [summary_view, reach_view])
def test_views_have_a_cell_per_column(view: object) -> None:
    table = view(results({("sgd", 0): SGD, ("kfac", 0): KFAC}))  # type: ignore[operator]
    assert {len(row) for row in table.rows} == {len(table.columns)}
