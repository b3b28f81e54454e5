from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kronfac.cli.main import app

pytest.importorskip("sklearn")


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["continual", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_a_penalty_beats_fine_tuning_on_permuted_digits(tmp_path: Path) -> None:
    arguments = ["permuted-digits", "--strategies", "finetune,kfac", "--tasks", "3", "--epochs", "5"]
    code, stdout, stderr = call(*arguments, "--out", str(tmp_path))
    assert code == 0
    assert stdout.startswith("permuted-digits, 3 tasks\n")
    assert "kfac seed 0: learned permutation 3; accuracy [%] on each task:" in stderr
    assert len(stderr.splitlines()) == 6  # piped: a plain line for each task
    code, stdout, stderr = call(*arguments, "--out", str(tmp_path), "--json")
    assert code == 0
    assert stderr == ""  # nothing is left to do
    finetune, kfac = json.loads(stdout)
    assert kfac["average_accuracy"] > finetune["average_accuracy"] + 0.02
    assert kfac["forgetting"] < finetune["forgetting"]
    assert {path.name for path in tmp_path.iterdir()} >= {
        "accuracy-matrices.png",
        "results.jsonl",
        "report.html",
        "runs",
    }
    page = (tmp_path / "report.html").read_text()
    assert "permuted-digits" in page
    (tmp_path / "report.html").unlink()
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 0
    assert result.stdout.endswith(f"report: {tmp_path / 'report.html'}\n")
    assert (tmp_path / "report.html").read_text() == page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "unknown stream 'nope'; known: permuted-digits"),
        (["permuted-digits", "--strategies", "nope"], "unknown strategy 'nope'; known: finetune"),
        (["permuted-digits", "--strategies", "ewc,ewc"], "must be different names"),
        (["permuted-digits", "--tasks", "0"], "tasks must be at least 1"),
        (["split-digits", "--tasks", "3"], "tasks must be one of [1, 2, 5], got 3"),
        (["permuted-digits", "--seeds", "0,0"], "seeds must be different"),
        (["permuted-digits", "--seeds", "x"], "--seeds must be whole numbers"),
        (["permuted-digits", "--epochs", "0"], "epochs must be at least 1"),
        (["permuted-digits", "--lr", "-1"], "lr must be a number above 0"),
        (["permuted-digits", "--threads", "0"], "threads must be at least 1"),
        (["permuted-digits", "--set", "ewc.strength=-1"], "ewc.strength must be a number above 0, got '-1'"),
        (["permuted-digits", "--set", "finetune.strength=1"], "finetune has no strength"),
        (
            ["permuted-digits", "--set", "ewc.rate=1"],
            "ewc has no setting 'rate'; known: strength, lr, damping, balance",
        ),
        (["permuted-digits", "--set", "ekfac.strength=1"], "not among the strategies"),
        (["permuted-digits", "--strategies", "ewc,ewc", "--grid", "strength=1,2"], "must be different names"),
        (["permuted-digits", "--slack", "0.1"], "--slack goes with --grid alone"),
        (["permuted-digits", "--grid", "lr=0.1", "--lr", "0.1"], "lr is an axis of the grid"),
        (["permuted-digits", "--grid", "damping=0,1", "--damping", "2"], "damping is an axis of the grid"),
        ([], "Missing argument"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    code, stdout, stderr = call(*arguments, *(["--out", str(tmp_path / "out")] if arguments else []))
    assert code == 2
    assert stdout == ""
    assert stderr.startswith("kronfac: error: ")
    assert stderr.count("\n") == 1
    assert message in stderr
    assert not (tmp_path / "out").exists()


def test_a_grid_chooses_by_the_newest_task_and_draws_both_accuracies(tmp_path: Path) -> None:
    arguments = ["permuted-digits-bn", "--strategies", "finetune,online-xkfac", "--tasks", "2", "--steps", "10"]
    arguments += ["--grid", "strength=1,1000", "--grid", "lr=0.003", "--balance", "none,adaptive", "--slack", "1"]
    code, stdout, stderr = call(*arguments, "--out", str(tmp_path))
    assert code == 0
    assert stdout.startswith("permuted-digits-bn, 2 tasks, chosen by the newest task\n")
    assert "strength 1000, balanced" in " ".join(stdout.split())
    assert len(stderr.splitlines()) == 10  # one run without penalty, and four
    code, again, stderr = call(*arguments, "--out", str(tmp_path), "--json")
    assert code == 0
    assert stderr == ""
    points = json.loads(again)
    assert len(points) == 5
    assert {(p["strategy"], p["balance"]) for p in points} == {
        ("finetune", "none"),
        ("online-xkfac", "none"),
        ("online-xkfac", "adaptive"),
    }
    assert all(0 < p["target"] <= 1 and 0 < p["average"] <= 1 for p in points)
    assert (tmp_path / "target-against-average.png").stat().st_size > 10_000


def test_missing_data_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KRONFAC_DATA", str(tmp_path))
    code, _, stderr = call("permuted-mnist", "--out", str(tmp_path / "out"))
    assert code == 2
    assert "ylecun/mnist" in stderr
    assert not (tmp_path / "out").exists()


def test_help_lists_streams_and_strategies() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "kronfac.cli.main", "continual", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0
    for name in ("split-cifar10", "rotated-mnist", "online-ewc"):
        assert name in result.stdout
