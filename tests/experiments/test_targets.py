"""When each optimiser reaches a stated value: by hand, in every file, and from the command line."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from tests.cli.test_cli import call
from tests.experiments.test_tables import KFAC, SGD, results

from kronfac import experiments
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.plan import Plan
from kronfac.experiments.results import Results
from kronfac.experiments.targets import target_view, targets, write_targets


def aiming(data: Results, *values: float, folder: Path | None = None) -> Results:
    return replace(data, plan=replace(data.plan, targets=values), folder=folder or data.folder)


def test_the_first_evaluation_at_or_below_the_value_counts() -> None:
    table = targets(aiming(results({("sgd", 0): SGD, ("kfac", 0): KFAC}), 3.0, 1.0))
    assert list(table["target"]) == [3.0, 3.0, 1.0, 1.0]
    sgd, kfac, never, last = table.to_dict("records")
    assert (sgd["steps"], sgd["seconds"], sgd["over_fastest"]) == (80, 1.6, 1.0)
    assert (kfac["steps"], kfac["seconds"], kfac["over_fastest"]) == (40, 2.0, 1.25)
    assert (never["reached"], never["best"], never["trained_seconds"]) == (0, 3.0, 2.0)
    assert math.isnan(never["seconds"])
    assert math.isnan(never["over_fastest"])
    assert (last["steps"], last["over_fastest"]) == (100, 1.0)


def test_seeds_are_averaged_and_one_that_misses_leaves_no_mean() -> None:
    later = [(0, 0.0, 9.0), (60, 3.0, 3.0)]
    runs = {("sgd", 0): SGD, ("kfac", 0): KFAC, ("sgd", 1): [(0, 0.0, 9.0)], ("kfac", 1): later}
    data = aiming(results(runs), 3.0)
    sgd, kfac = targets(data).to_dict("records")
    assert (sgd["reached"], sgd["seeds"]) == (1, 2)
    assert math.isnan(sgd["steps"])
    assert (kfac["steps"], kfac["seconds"], kfac["seconds_low"], kfac["seconds_high"]) == (50, 2.5, 2.0, 3.0)
    view = target_view(data)
    assert view.rows == [
        ["3", "SGD-momentum", "1 of 2 seeds", "–", "–", "–", "6 in 1.0 s"],
        ["3", "KFAC", "50", "3.33", "2.50 (2.00 to 3.00)", "1.00×", "2 in 4.0 s"],
    ]
    assert view.marks == {0: "bad"}


def test_files_are_written_where_there_are_values_to_reach(tmp_path: Path) -> None:
    data = results({("sgd", 0): SGD, ("kfac", 0): KFAC})
    assert write_targets(data) == []
    assert targets(data).empty
    table, text = write_targets(aiming(data, 3.5, 0.5, folder=tmp_path))
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["optimizer"] for row in rows] == ["SGD-momentum", "KFAC"] * 2
    assert rows[2]["seconds"] == ""
    assert "| 0.5 | KFAC | not reached | – | – | – | 1 in 5.0 s |" in text.read_text()


def test_an_optimiser_without_runs_has_not_reached_it() -> None:
    data = results({("sgd", 0): SGD, ("kfac", 0): KFAC})
    untuned = replace(aiming(data, 3.0), runs=data.of("sgd"))
    assert target_view(untuned).rows[1] == ["3", "KFAC", "not reached", "–", "–", "–", "– in – s"]


def test_the_command_writes_prints_and_reports_them(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["compare", "digits-mlp", "--optimizers", "sgd,adamw", "--steps", "40", "--threads", "1"]
    code, stdout, _ = call(*command, "--target", "1.5,0.001", "--out", str(out))
    assert code == 0
    assert "When each reaches a stated value" in stdout
    assert "not reached" in stdout
    assert (out / "targets.csv").is_file()
    assert (out / "targets.md").is_file()
    assert "When each optimiser reaches a stated train loss" in (out / "report.html").read_text()
    summary = json.loads((out / "summary.json").read_text())
    assert [row["target"] for row in summary["targets"]] == [1.5, 1.5, 0.001, 0.001]
    assert summary["targets"][2]["seconds"] is None
    (out / "targets.csv").unlink()
    code, stdout, _ = call("report", str(out))
    assert code == 0
    assert (out / "targets.csv").is_file()
    code, stdout, stderr = call(*command, "--out", str(out), "--json")  # runs are not repeated; no values this time
    assert code == 0
    assert stderr.count("already there") == 2
    assert json.loads(stdout)["targets"] == []


def test_plans_of_earlier_versions_are_read() -> None:
    plan = results({("sgd", 0): SGD}).plan
    before = json.loads(json.dumps(plan.as_json()))
    del before["targets"]
    assert Plan.from_json(before).targets == ()
    assert Plan.from_json(json.loads(json.dumps(replace(plan, targets=(1.5,)).as_json()))).targets == (1.5,)
    with pytest.raises(ExperimentError, match="no plan"):
        Plan.from_json({**before, "goal": 1})


@pytest.mark.parametrize(
    ("value", "message"),
    [("low", "--target must be numbers"), ("1,,2", "--target must be"), ("nan", "targets must be finite numbers")],
)
def test_bad_values_are_refused(value: str, message: str, tmp_path: Path) -> None:
    code, _, stderr = call("compare", "digits-mlp", "--target", value, "--out", str(tmp_path / "out"))
    assert code == 2
    assert message in stderr
    assert not (tmp_path / "out").exists()


def test_python_takes_them_too(tmp_path: Path) -> None:
    found = experiments.compare("digits-mlp", ["sgd"], steps=10, targets=[100.0], out=tmp_path, threads=1)
    assert list(experiments.targets(found)["steps"]) == [0]
