"""``kronfac reproduce kld-wrm`` on the embedded digits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kronfac.cli.main import app
from kronfac.experiments.problems import get_problem
from kronfac.experiments.reproduce.kld_wrm.study import make_study
from kronfac.experiments.results import run_folder
from kronfac.experiments.runner import run

pytest.importorskip("sklearn")

PATIENCE = 300.0  # seconds; of importance on a machine that is busy alone
SMALL = ["--data", "digits", "--rows", "so-0.5,q-0.5", "--runs", "1", "--workers", "2"]


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["reproduce", "kld-wrm", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def metrics(folder: Path) -> dict[str, list[dict[str, float]]]:
    found = {}
    for path in folder.glob("runs/*/metrics.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.parent.name] = [{k: v for k, v in record.items() if k != "seconds"} for record in records]
    return found


def start(out: Path, epochs: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "kronfac.cli", "reproduce", "kld-wrm", *SMALL, "--epochs", str(epochs)]
    command += ["--out", str(out)]

    def listen() -> None:  # what a shell starts in the background ignores Ctrl-C, and so would its children
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, preexec_fn=listen)


def wait_for_steps(out: Path, runs: int, since: float) -> None:
    until = time.monotonic() + PATIENCE
    while sum(path.stat().st_mtime > since for path in out.glob("runs/*/settings.json")) < runs:
        assert time.monotonic() < until, "the workers did not start"
        time.sleep(0.05)
    time.sleep(0.3)


def test_the_study_ends_in_a_table_and_pictures(tmp_path: Path) -> None:
    code, stdout, stderr = call(*SMALL, "--epochs", "2", "--out", str(tmp_path))
    assert code == 0
    assert "SO-KLD-WRM, ρ = 0.5" in stdout
    assert "(97.79)" in stdout
    assert "[2/2]" in stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"table.md", "table.csv", "accuracy.png", "loss.png", "so.png", "q.png", "study.json", "runs"}
    before = metrics(tmp_path)
    code, stdout, _ = call(*SMALL, "--epochs", "2", "--out", str(tmp_path), "--table-only", "--json")
    assert code == 0
    found = json.loads(stdout)
    assert [row["row"] for row in found["rows"]] == ["so-0.5", "q-0.5"]
    assert [row["runs"] for row in found["rows"]] == [1, 1]
    assert found["rows"][0]["σ acc"] is None
    last = [records[-1]["test_error"] for name, records in before.items() if name.startswith("kldwrm_so")]
    assert found["rows"][0]["μ acc"] == pytest.approx(100 - last[0])
    other = tmp_path / "other"
    call(*SMALL, "--epochs", "2", "--out", str(other), "--known", str(tmp_path / "runs.csv"))
    assert (other / "table.md").read_text() == (tmp_path / "table.md").read_text()
    assert not list(other.glob("runs/*/settings.json"))  # nothing was trained


def uninterrupted(folder: Path, epochs: int) -> None:
    """The same runs by the runner of every other command, in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for settings in make_study(["so-0.5", "q-0.5"], 1, epochs, "digits").all_settings():
            problem = get_problem(settings.problem)
            run(problem, settings, problem.data(), run_folder(folder, settings))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(os.name == "nt", reason="signals of a terminal")
def test_killed_and_interrupted_studies_go_on_bit_for_bit(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    uninterrupted(whole, 20)
    for ending in (signal.SIGKILL, signal.SIGINT):
        before = time.time()
        with start(cut, 20) as process:
            try:
                wait_for_steps(cut, 2, before)
                process.send_signal(ending)
                code = process.wait(PATIENCE)
            finally:
                process.kill()
    assert code == 130, "the study was over before it was interrupted"
    assert len(list(cut.glob("runs/*/checkpoint.pt"))) == 2
    assert call(*SMALL, "--epochs", "20", "--out", str(cut))[0] == 0
    assert metrics(cut) == metrics(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "nope"], "unknown row 'nope'; known: all, best, kfac"),
        (["--rows", ","], "--rows must be names or numbers with commas"),
        (["--runs", "0"], "runs must be at least 1, got 0"),
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--runs", "99999999999999"], "runs must be at most 10000, got 99999999999999"),
        (["--workers", "0"], "workers must be at least 1"),
        (["--table-only"], "out holds no runs to make a table of, and table_only trains none"),
        (["--data", "nope"], "unknown data 'nope'; known: mnist, digits"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    code, stdout, stderr = call(*arguments, "--out", str(tmp_path / "out"))
    assert code == 2
    assert stdout == ""
    assert len(stderr.splitlines()) == 1
    assert message in stderr
    assert not (tmp_path / "out").exists()


def test_the_group_without_a_command_shows_its_help() -> None:
    result = CliRunner().invoke(app, ["reproduce"])
    assert "kld-wrm" in result.stdout
