"""Folders of runs that were edited, or gone on with on another number of threads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.calls import call

from kronfac.experiments.runner import Interrupted
from kronfac.experiments.training import Training

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("plotly")
RUN = ["train", "digits-mlp", "--optimizer", "sgd", "--steps", "20", "--evaluate-every", "10"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    assert call(*RUN, "--threads", "1", "--out", str(path))[0] == 0
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[-1].update(train_loss="x"), "an evaluation has no number train_loss"),
        (lambda lines: lines[-1].update(train_loss=float("nan")), "an evaluation has no number train_loss"),
        (lambda lines: lines[-1].pop("test_loss"), "an evaluation has no number test_loss"),
        (lambda lines: lines[-1].pop("train_loss"), "an evaluation has no number train_loss"),
        (lambda lines: lines[0].pop("step"), "an evaluation has no number step"),
        (lambda lines: lines.append(lines[0]), "step 0 comes after step 20"),
        (lambda lines: lines.pop(), "no evaluation at step 20, at which the run ended"),
        (lambda lines: lines.clear(), "no evaluation at step 20, at which the run ended"),
    ],
)
def test_edited_metrics_are_one_line(folder: Path, change: Callable[[list[Any]], object], message: str) -> None:
    (path,) = folder.glob("runs/*/metrics.jsonl")
    whole = path.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    change(lines)
    try:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        code, stdout, stderr = call("report", str(folder))
    finally:
        path.write_text(whole)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert f"metrics.jsonl is damaged: {message}; delete its folder" in stderr


def test_runs_of_another_number_of_threads_are_named(folder: Path) -> None:
    assert json.loads(next(folder.glob("runs/*/result.json")).read_text())["threads"] == [1]
    code, stdout, stderr = call(*RUN, "--threads", "2", "--out", str(folder))
    assert code == 0
    assert "already there, trained with 1 threads, not 2: its last digits may be others" in stderr
    assert "1 of 1 runs were trained, in whole or in part, with another number of threads than 2 (1)" in stdout
    assert "with another number of threads than 2 (1)" in (folder / "report.html").read_text()
    code, stdout, stderr = call(*RUN, "--threads", "1", "--out", str(folder))
    assert code == 0
    assert "trained with" not in stderr
    assert "number of threads" not in stdout


def test_a_run_goes_on_with_other_threads_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(training: Training) -> None:
        if training.step == 5:
            raise Interrupted
        advance(training)

    advance = Training.advance
    options = ["--checkpoint-every", "0", "--out", str(tmp_path)]
    with monkeypatch.context() as context:
        context.setattr(Training, "advance", stopped)
        assert call(*RUN, "--threads", "1", *options)[0] == 130
    code, stdout, stderr = call(*RUN, "--threads", "2", *options)
    assert code == 0
    assert "sgd seed 0 goes on at step 5, trained with 1 threads, not 2: its last digits may be others" in stderr
    assert json.loads(next(tmp_path.glob("runs/*/result.json")).read_text())["threads"] == [1, 2]
    assert "another number of threads than 2 (1)" in stdout


@pytest.mark.parametrize("optimizer", ["kfac", "sgd", "adam"])
def test_a_rate_beyond_all_numbers_is_refused(optimizer: str, tmp_path: Path) -> None:
    options = ["--steps", "3", "--set", "lr=1e300", "--out", str(tmp_path)]
    code, _, stderr = call("train", "digits-mlp", "--optimizer", optimizer, *options)
    assert code == 2
    assert "3.4e+38 at most" in stderr


@pytest.mark.parametrize(("clip", "code"), [("auto", 0), ("none", 1)])
def test_a_rate_beyond_all_sense_is_clipped_or_diverges(clip: str, code: int, tmp_path: Path) -> None:
    options = ["--steps", "3", "--set", "lr=1e30", "--set", f"kl_clip={clip}", "--out", str(tmp_path)]
    found, stdout, _ = call("train", "digits-mlp", "--optimizer", "kfac", *options)
    assert found == code
    assert ("diverged" in stdout) == bool(code)


def test_a_warm_up_ends_at_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warming, seen = Training._warming, 0

    def interrupting(training: Training, count: int) -> Iterator[Any]:
        nonlocal seen
        for batch in warming(training, count):
            seen += 1
            if seen == 4:  # the first is the rehearsal's
                training._stopped = lambda: True
            yield batch

    monkeypatch.setattr(Training, "_warming", interrupting)
    options = ["--steps", "3", "--set", "warm_up=1000", "--out", str(tmp_path)]
    assert call("train", "digits-mlp", "--optimizer", "kfac", *options)[0] == 130
    assert seen == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizers", 3),
        ("optimizers", [3]),
        ("seeds", ["x"]),
        ("steps", "many"),
        ("evaluate_every", None),
        ("threads", "a"),
        ("examples", "a"),
        ("targets", ["z"]),
        ("hyperparameters", {"sgd": 3}),
        ("hyperparameters", {"sgd": {"lr": "q"}}),
        ("grid", []),
        ("grid", {"sgd": {"lr": 5}}),
        ("metric", 4),
        ("seconds", "b"),
        ("epochs", "b"),
        ("grid_steps", "b"),
        ("problem", 3),
        ("problem", []),
    ],
)
def test_an_edited_plan_is_one_line(folder: Path, name: str, value: object) -> None:
    path = folder / "comparison.json"
    whole = path.read_text()
    content = json.loads(whole)
    content["plan"][name] = value
    try:
        path.write_text(json.dumps(content))
        code, stdout, stderr = call("report", str(folder))
    finally:
        path.write_text(whole)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert "comparison.json" in stderr
