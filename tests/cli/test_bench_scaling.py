"""``kronfac bench --scaling``: points are measured, written, gone on from and skipped."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from tests.cli.test_cli import call

TINY = ["--sizes", "width=4,8", "--sizes", "kernel=1", "--rounds", "2", "--threads", "1"]


def test_points_are_written_printed_and_gone_on_from(tmp_path: Path) -> None:
    out = tmp_path / "scaling"
    command = ["bench", "--scaling", "width,kernel", *TINY, "--out", str(out)]
    code, stdout, stderr = call(*command)
    assert code == 0
    for text in ("width: perceptron of 3 layers", "kernel: 3 convolutions", "growth", "scaling.md", "scaling.png"):
        assert text in stdout
    assert "width 8: 2 rounds" in stderr
    found = json.loads((out / "scaling.json").read_text())
    assert [(point["axis"], point["size"]) for point in found["points"]] == [("width", 4), ("width", 8), ("kernel", 1)]
    assert found["setting"]["threads"] == 1
    rows = list(csv.DictReader((out / "scaling.csv").read_text().splitlines()))
    assert len(rows) == 3 * 4
    assert {row["part"] for row in rows} == {"forward+backward, ms", "statistics", "inverse", "precondition"}
    assert "**Width**: perceptron of 3 layers, batch 128" in (out / "scaling.md").read_text()
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_goes_on_and_other_settings_are_refused(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "scaling")]
    command = ["bench", "--scaling", "depth", "--sizes", "depth=1,2", "--threads", "1", *out]
    limited = ["--rounds", "2", "--budget", "0"]
    code, stdout, stderr = call(*command, *limited)
    assert code == 0
    assert "depth 2 is skipped: " in stderr
    assert "budget 0 s" in stdout
    code, stdout, _ = call(*command, "--rounds", "2", "--json")
    assert code == 0
    first = json.loads(stdout)["points"]
    assert [point["rounds"] for point in first] == [2, 2]
    code, stdout, stderr = call(*command, *limited, "--json")
    assert code == 0
    assert stderr.count("already there") == 2
    assert json.loads(stdout)["points"] == first
    code, stdout, stderr = call(*command, "--rounds", "3")
    assert (code, stdout) == (2, "")
    assert "measured with rounds 2, not 3" in stderr
    code, stdout, _ = call(*command, "--rounds", "3", "--fresh", "--only", "inverse", "--json")
    assert code == 0
    assert [list(point["rows"]) for point in json.loads(stdout)["points"]] == [["forward+backward, ms", "inverse"]] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scaling", "height"], "unknown axis of scaling 'height'; known: width, depth, batch, image, kernel"),
        (["--scaling", "kernel", "--sizes", "kernel=2"], "kernel must be an odd whole number above 0, got 2"),
        (["--scaling", "width", "--sizes", "width=a"], "--sizes must be whole numbers"),
        (["--scaling", "width", "--sizes", "width"], "--sizes takes name=value"),
        (["--scaling", "width", "--workloads", "kfc"], "leave --workloads and --parts out"),
        (["--scaling", "width", "--precision", "float32,bfloat16"], "takes one --precision"),
        (["--scaling", "width", "--only", "step"], "scaling is measured of statistics, inverse, precondition"),
        (["--sizes", "width=4"], "belong to --scaling"),
        (["--budget", "4"], "belong to --scaling"),
        (["--scaling", "width", "--budget", "-1"], "--budget"),
        (["--scaling", "width", "--sizes", "depth=1"], "sizes are given for 'depth'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    code, stdout, stderr = call("bench", *arguments)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("kronfac: error: ")
    assert stderr.count("\n") == 1
    assert message in stderr
