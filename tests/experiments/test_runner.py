from __future__ import annotations

import dataclasses
import json
import signal
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kronfac.experiments import runner
from kronfac.experiments.batches import Batches
from kronfac.experiments.checkpoint import load_checkpoint, save_checkpoint
from kronfac.experiments.errors import CheckpointError, ExperimentError
from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.problems import get_problem
from kronfac.experiments.progress import Progress
from kronfac.experiments.records import MetricsLog, read_records
from kronfac.experiments.settings import RunSettings, check_settings

PROBLEM = get_problem("digits-mlp")


def settings(
    optimizer: str = "sgd", steps: int | None = 30, seconds: float | None = None, **values: object
) -> RunSettings:
    resolved = get_optimizer(optimizer).resolve(values)
    return RunSettings("digits-mlp", optimizer, resolved, 0, steps, seconds, evaluate_every=10)


class StopAt(Progress):
    """Behaves like a Ctrl-C at a given step."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number = step, number

    def stepped(self, step: int, seconds: float, batch_loss: float) -> None:
        if step == self.step:
            signal.raise_signal(self.number)


def lines(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_records(folder / "metrics.jsonl")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("optimizer", "values"),
    [
        ("sgd", {"schedule": "cosine", "average": 0.9}),
        ("adam", {}),
        ("kfac", {"kl_clip": 0.1, "stats_every": 3, "invert_every": 7, "lr": 0.05, "damping": 0.1}),
    ],
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, optimizer: str, values: dict[str, object], number: int
) -> None:
    wanted, data = settings(optimizer, **values), PROBLEM.data()
    runner.run(PROBLEM, wanted, data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        runner.run(PROBLEM, wanted, data, tmp_path / "cut", StopAt(17, number))
    assert (tmp_path / "cut" / "checkpoint.pt").exists()
    assert not (tmp_path / "cut" / "result.json").exists()
    torch.rand(7)  # the global generator must not matter
    result = runner.run(PROBLEM, wanted, data, tmp_path / "cut")
    assert result["status"] == "done"
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert not (tmp_path / "cut" / "checkpoint.pt").exists()


@pytest.mark.parametrize("optimizer", ["kfac", "ekfac", "tkfac", "adaptive_kfac", "kldwrm_so", "kldwrm_q", "kldwrm_qe"])
def test_the_empirical_source_is_given_the_targets(tmp_path: Path, optimizer: str) -> None:
    wanted, data = settings(optimizer, steps=4, source="empirical"), PROBLEM.data()
    assert runner.run(PROBLEM, wanted, data, tmp_path / "empirical")["status"] == "done"
    runner.run(PROBLEM, settings(optimizer, steps=4), data, tmp_path / "sampled")
    assert lines(tmp_path / "empirical")[-1] != lines(tmp_path / "sampled")[-1]


def test_a_warm_up_holds_one_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive, most, plain = weakref.WeakSet[torch.Tensor](), 0, Batches.at

    def at(self: Batches, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal most
        inputs, targets = plain(self, step)
        alive.add(inputs)
        most = max(most, len(alive))
        return inputs, targets

    monkeypatch.setattr(Batches, "at", at)
    runner.run(PROBLEM, settings("kfac", steps=1, warm_up=12), PROBLEM.data(), tmp_path)
    assert most < 6


def test_metrics_past_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    wanted, data = settings(), PROBLEM.data()
    runner.run(PROBLEM, wanted, data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        runner.run(PROBLEM, wanted, data, tmp_path / "cut", StopAt(13))
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 14, "epoch": 0.9}\n{"step": 15, "ep')
    runner.run(PROBLEM, wanted, data, tmp_path / "cut")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_one_line_per_step_and_metrics_where_they_are_due(tmp_path: Path) -> None:
    runner.run(PROBLEM, settings(steps=25), PROBLEM.data(), tmp_path)
    records = read_records(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(26))
    assert [r["step"] for r in records if "train_loss" in r] == [0, 10, 20, 25]
    assert set(PROBLEM.metrics) <= set(records[-1])
    assert records[15]["epoch"] == 1.0  # 1500 examples in batches of 100
    seconds = [r["seconds"] for r in records]
    assert seconds == sorted(seconds)


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    data = PROBLEM.data()
    first = runner.run(PROBLEM, settings(), data, tmp_path)
    stamp = (tmp_path / "metrics.jsonl").stat().st_mtime_ns
    assert runner.run(PROBLEM, settings(), data, tmp_path) == first
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == stamp


def test_a_diverging_run_is_recorded_and_holds_no_nan(tmp_path: Path) -> None:
    result = runner.run(PROBLEM, settings(lr=1e20), PROBLEM.data(), tmp_path)
    assert result["status"] == "diverged"
    assert "diverged at step" in str(result["note"])
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


def test_a_diverging_kfac_run_is_recorded_too(tmp_path: Path) -> None:
    result = runner.run(PROBLEM, settings("kfac", lr=1e20, kl_clip=None), PROBLEM.data(), tmp_path)
    assert result["status"] == "diverged"


def test_a_budget_in_seconds_ends_the_run(tmp_path: Path) -> None:
    result = runner.run(PROBLEM, settings(steps=None, seconds=0.05), PROBLEM.data(), tmp_path)
    assert result["status"] == "done"
    assert float(result["seconds"]) >= 0.05  # type: ignore[arg-type]
    assert "train_loss" in read_records(tmp_path / "metrics.jsonl")[-1]


def test_the_callers_generator_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    runner.run(PROBLEM, settings(steps=2), PROBLEM.data(), tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_runs_work_outside_the_main_thread(tmp_path: Path) -> None:
    results: list[dict[str, object]] = []
    data = PROBLEM.data()
    thread = threading.Thread(target=lambda: results.append(runner.run(PROBLEM, settings(steps=2), data, tmp_path)))
    thread.start()
    thread.join()
    assert results[0]["status"] == "done"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path, run: path.write_bytes(b"rubbish"), "cannot be read; delete it"),
        (
            lambda path, run: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
            "cannot be read; delete it",
        ),
        (lambda path, run: torch.save({"model": {}}, path), "is not a checkpoint of a kronfac run"),
        (lambda path, run: torch.save(torch.nn.Linear(1, 1), path), "cannot be read"),
        (lambda path, run: save_checkpoint(path, "adam-seed1", {}), "belongs to the run 'adam-seed1'"),
        (lambda path, run: save_checkpoint(path, run, {"model": {}}), "does not fit this run"),
    ],
)
def test_a_corrupt_or_foreign_checkpoint_is_refused_and_nothing_touched(
    tmp_path: Path, write: Callable[[Path, str], object], message: str
) -> None:
    data = PROBLEM.data()
    with pytest.raises(KeyboardInterrupt):
        runner.run(PROBLEM, settings(), data, tmp_path, StopAt(13))
    path = tmp_path / "checkpoint.pt"
    write(path, settings().folder_name)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=message) as error:
        runner.run(PROBLEM, settings(), data, tmp_path)
    assert str(path) in str(error.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_checkpoint_never_runs_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path(tmp_path / "ran").touch, ())

    torch.save(Bomb(), tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "checkpoint.pt", "run")
    assert not (tmp_path / "ran").exists()


def test_metrics_shorter_than_their_checkpoint_are_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(CheckpointError, match="shorter than its checkpoint"):
        MetricsLog(tmp_path / "metrics.jsonl", 100)


def test_a_damaged_line_is_named_but_a_cut_last_one_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step"')
    assert read_records(path) == [{"step": 0}]
    path.write_text('{"step": 0}\nrubbish\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match="line 2 is damaged"):
        read_records(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1 and at most 1000000000000, or none, got 0"),
        ({"steps": None}, "needs a budget"),
        ({"seconds": -1.0}, "seconds must be a number above 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"evaluate_every": 0}, "evaluate_every must be"),
    ],
)
def test_settings_out_of_range_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        check_settings(dataclasses.replace(settings(), **change))  # type: ignore[arg-type]


def test_folder_names_change_with_every_setting() -> None:
    one = settings()
    others = [dataclasses.replace(one, seed=1), dataclasses.replace(one, steps=31), settings(lr=0.5)]
    assert len({run.folder_name for run in (one, *others)}) == 4
    assert json.dumps(dataclasses.asdict(one))
