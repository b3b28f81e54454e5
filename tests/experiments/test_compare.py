from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kronfac import experiments
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.lock import locked
from kronfac.experiments.progress import Progress

Metrics = Callable[[Path], list[dict[str, float]]]

COMMAND = [
    sys.executable, "-m", "kronfac.cli", "compare", "digits-mlp", "--optimizers", "sgd,kfac", "--steps", "250",
    "--set", "kfac.lr=0.05", "--set", "kfac.damping=0.1", "--threads", "1", "--checkpoint-every", "0.05", "--out",
]  # fmt: skip


class Listener(Progress):
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.ended: list[tuple[str, str]] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def finished(self, settings: object, status: str, note: str) -> None:
        self.ended.append((status, note))


@pytest.mark.slow
def test_kill_9_and_the_same_command_again_give_the_metrics_of_an_uninterrupted_run(
    tmp_path: Path, metrics_of: Metrics
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*COMMAND, str(whole)], check=True, capture_output=True)
    kills = 0
    while not (killed / "report.html").exists():
        process = subprocess.Popen([*COMMAND, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        # Killed once after something was checkpointed in each of the two runs, then left alone.
        while process.poll() is None:
            checkpoints = list(killed.glob("runs/*/checkpoint.pt"))
            done = len(list(killed.glob("runs/*/result.json")))
            if kills == done and checkpoints:
                time.sleep(0.1)
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    assert kills >= 1
    assert metrics_of(killed) == metrics_of(whole)
    results = [json.loads((folder / "summary.json").read_text())["summary"] for folder in (whole, killed)]
    for row in (*results[0], *results[1]):
        for key in ("seconds", "equal_seconds", "at_equal_seconds", "ms_per_step"):
            del row[key]
    assert results[0] == results[1]


def test_compare_writes_everything_and_adds_to_what_is_there(tmp_path: Path) -> None:
    listener = Listener()
    results = experiments.compare("digits-mlp", ["sgd", "adam"], steps=30, out=tmp_path, threads=1)
    assert [run.status for run in results.runs] == ["done", "done"]
    names = {path.name for path in tmp_path.iterdir()}
    assert {"comparison.json", "summary.json", "report.html", "train-loss-steps.png", "train-loss-seconds.png"} <= names
    results = experiments.compare(
        "digits-mlp", ["sgd", "adam", "adamw"], steps=30, seeds=[0, 1], out=tmp_path, threads=1, progress=listener
    )
    assert [note for _, note in listener.ended].count("already there") == 2
    assert len(results.runs) == 6
    table = experiments.summary(results)
    assert list(table["optimizer"]) == ["SGD-momentum", "Adam", "AdamW"]
    assert (table["status"] == "done").all()
    assert table["spread"].notna().all()


def test_a_grid_is_searched_recorded_and_its_winner_used(tmp_path: Path) -> None:
    listener = Listener()
    results = experiments.compare(
        "digits-mlp",
        ["sgd"],
        steps=40,
        out=tmp_path,
        grid={"sgd": {"lr": [0.0001, 0.001, 1e20], "momentum": [0.5, 0.9]}},
        grid_steps=20,
        threads=1,
        progress=listener,
    )
    points = results.grids["sgd"]
    assert len(points) == 6
    assert {point.result.status for point in points} == {"done", "diverged"}
    assert all(point.result.settings.steps == 20 for point in points)
    finals = {tuple(point.varied.values()): point.result.final("train_loss") for point in points}
    assert results.chosen["sgd"]["lr"] == 0.001
    assert min(finals, key=lambda key: finals[key]) == (0.001, results.chosen["sgd"]["momentum"])
    assert results.runs[0].settings.steps == 40
    assert any("best of 6 points is lr=0.001" in message for message in listener.messages)
    page = (tmp_path / "report.html").read_text()
    assert "diverged" in page
    assert "chosen" in page


def test_a_winner_at_the_edge_is_pointed_out(tmp_path: Path) -> None:
    listener = Listener()
    grid = {"sgd": {"lr": [0.0001, 0.001, 0.01]}}
    experiments.compare("digits-mlp", ["sgd"], steps=20, out=tmp_path, grid=grid, threads=1, progress=listener)
    assert any("lr=0.01 is at the edge of what was tried" in message for message in listener.messages)


def test_a_diverged_run_does_not_stop_the_others(tmp_path: Path) -> None:
    results = experiments.compare(
        "digits-mlp", ["sgd", "adam"], steps=20, out=tmp_path, hyperparameters={"sgd": {"lr": 1e20}}, threads=1
    )
    assert [run.status for run in results.runs] == ["diverged", "done"]
    assert list(experiments.summary(results)["status"]) == ["diverged", "done"]
    assert experiments.headlines(results) == []


def test_fresh_throws_old_runs_away(tmp_path: Path) -> None:
    experiments.compare("digits-mlp", ["sgd"], steps=10, out=tmp_path, threads=1)
    listener = Listener()
    experiments.compare("digits-mlp", ["sgd"], steps=10, out=tmp_path, threads=1, fresh=True, progress=listener)
    assert listener.ended == [("done", "")]


def test_budgets_in_epochs_follow_the_batch_size(tmp_path: Path) -> None:
    results = experiments.compare(
        "digits-mlp", ["sgd", "adam"], epochs=2, out=tmp_path, hyperparameters={"adam": {"batch_size": 300}}, threads=1
    )
    assert [run.settings.steps for run in results.runs] == [30, 10]
    assert [run.evaluations[-1]["epoch"] for run in results.runs] == [2.0, 2.0]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ExperimentError, match="another process is working in"):
        experiments.compare("digits-mlp", ["sgd"], steps=1, out=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"problem": "digit"}, "unknown problem 'digit'"),
        ({"optimizers": []}, "no optimiser is named"),
        ({"optimizers": ["sgd", "sgd"]}, "optimiser 'sgd' is named twice"),
        ({"optimizers": ["foo"]}, "unknown optimiser 'foo'"),
        ({"seeds": []}, "no seed"),
        ({"seeds": [1, 1]}, "seed 1 is named twice"),
        ({"seeds": [-1]}, "seed must be"),
        ({"steps": -1}, "steps must be"),
        ({"steps": None, "epochs": -1.0}, "epochs must be"),
        ({"metric": "accuracy"}, "unknown metric of digits-mlp 'accuracy'; known: train_loss"),
        ({"hyperparameters": {"adam": {}}}, "'adam', which is not among"),
        ({"hyperparameters": {"sgd": {"foo": 1}}}, "sgd has no hyper-parameter 'foo'"),
        ({"grid": {"sgd": {"lr": ["x"]}}}, "sgd.lr must be"),
        ({"grid_steps": 0}, "grid_steps must be"),
        ({"threads": 0}, "threads must be"),
        ({"device": "abacus"}, "device 'abacus' is not usable"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    given = {"problem": "digits-mlp", "optimizers": ["sgd"], "steps": 5, **arguments}
    with pytest.raises(ExperimentError, match=message):
        experiments.compare(out=tmp_path / "out", **given)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ExperimentError, match="cannot write to"):
        experiments.compare("digits-mlp", ["sgd"], steps=5, out=tmp_path / "out")


def test_results_of_a_foreign_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="holds no runs of kronfac"):
        experiments.read_results(tmp_path)
    (tmp_path / "comparison.json").write_text('{"plan": {"a": 1}}')
    with pytest.raises(ExperimentError, match="no plan of a kronfac comparison"):
        experiments.read_results(tmp_path)
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(ExperimentError, match="cannot be read"):
        experiments.read_results(tmp_path)
