"""``kronfac bench``: every part is measured, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.cli.test_cli import call

from kronfac.cli.bench_tables import extra_tables, over_base
from kronfac.experiments.bench import Found, Spread, advances, make, measure
from kronfac.linalg.rounded import pays_on

PARTS = [
    "statistics",
    "statistics, own forward",
    "statistics of TKFAC",
    "inverse",
    "inverse, asynchronous, visible",
    "precondition",
]


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


def test_keeping_freed_memory_is_asked_for_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("kronfac.cli.bench.keep_freed_memory", lambda: bool(asked.append(True)) or can)
    arguments = ["bench", "--workloads", "small", "--rounds", "2", "--only", "inverse", "--threads", "1"]
    can = True
    assert json.loads(call(*arguments, "--json")[1])["freed memory"] == "by default"
    assert not asked
    assert json.loads(call(*arguments, "--json", "--keep-freed-memory")[1])["freed memory"] == "kept"
    assert "freed memory kept" in call(*arguments, "--keep-freed-memory")[1]
    can = False
    code, _, stderr = call(*arguments, "--keep-freed-memory")
    assert code != 0
    assert "glibc" in stderr


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
    assert len(notes) == advances("small", 2, ["whole"])


def test_wide_layers_have_cheaper_forms() -> None:
    rows = measure("autoencoder", 2, only=["precondition", "wide"])
    by_rows, rounded = ["precondition by rows"], []
    if pays_on(torch.device("cpu")):
        by_rows, rounded = [*by_rows, "precondition by rows, bfloat16"], ["precondition, bfloat16"]
    assert list(rows) == ["forward+backward, ms", *by_rows, "precondition", *rounded]
    assert all(spread.median > 0 for name, spread in rows.items() if name not in by_rows)


def test_floors_and_profiles_are_written_and_printed(tmp_path: Path) -> None:
    out = tmp_path / "bench"
    arguments = ["--workloads", "gpt2-small", "--precision", "float32,bfloat16", "--only", "roofline,profile"]
    code, stdout, _ = call("bench", *arguments, "--rounds", "2", "--threads", "1", "--out", str(out))
    assert code == 0
    found = json.loads((out / "bench.json").read_text())
    labels = ["gpt2-small", "gpt2-small, bfloat16"]
    for kind in ("over forward+backward", "ceilings", "roofline", "profile"):
        assert list(found[kind]) == labels
    assert list(found["roofline"][labels[1]]) == ["statistics", "inverse", "precondition"]
    assert "memory, bytes" not in found
    for text in (*labels, "floors at the measured", "TFLOP/s, bfloat16", "plain GFLOP", "profile of inverse"):
        assert text in stdout


def test_a_profile_alone_has_no_times(tmp_path: Path) -> None:
    out = tmp_path / "bench"
    code, stdout, _ = call("bench", "--workloads", "small", "--only", "profile", "--threads", "1", "--out", str(out))
    assert code == 0
    assert "Cost over" not in stdout
    assert stdout.count("profile of") == 4
    assert not (out / "bench.png").exists()


def test_tables_have_a_dash_where_a_workload_has_no_such_part() -> None:
    one, other = (Found(rows={part: Spread(1.0, 1.0, 1.0)}) for part in ("inverse", "statistics"))
    memory = {"factors": 2e6, "step, sgd": 3e6, "kfac above sgd, over factors": 2.5}
    table = over_base({"a": one, "b": other, "c": Found(memory=memory)})
    assert table.columns == ["over forward+backward", "a", "b"]
    assert table.rows[0] == ["inverse", "1.00 (1.00 to 1.00)", "–"]
    [(peaks, title)] = extra_tables({"c": Found(memory=memory)})
    assert title == "c: peak memory"
    assert peaks.rows == [["factors", "2.0", "1.00"], ["step, sgd", "3.0", "1.50"], ["kfac above sgd", "", "2.50"]]


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
        (
            ["--workloads", "vgg"],
            "there is no workload 'vgg'; known are autoencoder, kfc, resnet20, resnet50, gpt2, small",
        ),
        (["--workloads", ""], "--workloads must be names"),
        (["--rounds", "1"], "--rounds"),
        (["--processor-time", "--threads", "2"], "give --threads 1"),
        (["--only", "speed"], "there is no part 'speed'; known are statistics"),
        (["--only", "memory"], "benchmarks/memory.py"),
        (["--precision", "tf32"], "tf32 is a format of CUDA devices"),
        (["--precision", "float16"], "there is no precision 'float16'"),
        (["--device", "tpu"], "there is no device 'tpu'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    code, stdout, stderr = call("bench", *arguments)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("kronfac: error: ")
    assert stderr.count("\n") == 1
    assert message in stderr
