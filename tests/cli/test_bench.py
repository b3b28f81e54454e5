"""``kronfac bench``: every part is measured, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.test_cli import call

from kronfac.experiments.bench import Spread, advances, make, measure

PARTS = ["statistics", "statistics of TKFAC", "inverse", "inverse, asynchronous, visible", "precondition"]


def test_parts_are_measured_written_and_printed(tmp_path: Path) -> None:
    out = tmp_path / "bench"
    arguments = ["bench", "--workloads", "small", "--rounds", "2", "--parts", "--threads", "1", "--out", str(out)]
    code, stdout, _ = call(*arguments, "--json")
    assert code == 0
    found = json.loads(stdout)
    rows = found["over forward+backward"]["small"]
    assert list(rows) == ["forward+backward, ms", *PARTS]
    assert all(row["low"] <= row["median"] <= row["high"] for row in rows.values())
    assert rows["forward+backward, ms"]["low"] > 0
    assert rows["inverse"]["low"] > 0
    assert found["machine"]["threads"] == 1
    assert json.loads((out / "bench.json").read_text()) == found
    assert len((out / "bench.csv").read_text().splitlines()) == 1 + len(rows)
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_whole_steps_and_progress() -> None:
    notes: list[str] = []
    rows = measure("small", 2, advance=notes.append)
    assert [name for name in rows if name.startswith("whole step")] == [
        "whole step, sgd",
        "whole step, adamw",
        "whole step, kfac",
        "whole step, kfac, asynchronous",
        "whole step, kfac, default clip",
    ]
    assert len(notes) == advances(2, True)


def test_spread_is_that_of_the_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)
    assert str(Spread(1.0, 0.5, 1.5)) == "1.00 (0.50 to 1.50)"


def test_workloads_are_the_same_each_time() -> None:
    first, second = make("small"), make("small")
    assert (first.inputs == second.inputs).all()
    assert all((p == q).all() for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "vgg"], "there is no workload 'vgg'; known are autoencoder, kfc, resnet20, resnet50, gpt2, small"),
        (["--workloads", ""], "--workloads must be names"),
        (["--rounds", "1"], "--rounds"),
        (["--processor-time", "--threads", "2"], "give --threads 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    code, stdout, stderr = call("bench", *arguments)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("kronfac: error: ")
    assert stderr.count("\n") == 1
    assert message in stderr
