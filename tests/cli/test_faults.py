"""Faults of the command line that were found by hand."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.cli.calls import call

from kronfac import experiments
from kronfac.cli.group import how_to_go_on
from kronfac.cli.main import main
from kronfac.experiments import approximation_table, continual
from kronfac.experiments.approximation_table import PARTS, TableSettings, measure_table, write_table
from kronfac.experiments.continual import plans, runner
from kronfac.experiments.lock import locked

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("plotly")
TABLE = ["analyse", "table", "--problems", "digits-mlp", "--approximations", "diagonal", "--sources", "exact"]
STREAM = ["continual", "permuted-digits", "--tasks", "2", "--steps", "2"]


def refused(message: str, *arguments: str) -> None:
    code, stdout, stderr = call(*arguments)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert message in stderr


def settings_of_table(samples: int) -> TableSettings:
    return TableSettings(("digits-mlp",), ("diagonal",), ("exact",), samples)


def test_a_table_leaves_the_finished_parts_of_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximation_table, "markdown", lambda *_: "")
    own, other = (tmp_path / PARTS / settings_of_table(samples).part("digits-mlp", 500) for samples in (1, 2))
    own.parent.mkdir()
    for path in (own, other):
        path.write_text("{}")
    write_table(settings_of_table(1), [{"error": 0.5}], tmp_path, "")
    assert list(own.parent.iterdir()) == [other]
    write_table(settings_of_table(2), [{"error": 0.5}], tmp_path, "")
    assert not other.parent.exists()


def test_what_a_killed_table_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximation_table, "markdown", lambda *_: "")
    monkeypatch.setattr(approximation_table, "_measure", lambda *_: [{"error": 0.5}])
    leftover = tmp_path / PARTS / ".digits-mlp-0-abc.json.123.part"
    leftover.parent.mkdir()
    leftover.write_text("")
    rows = measure_table(settings_of_table(1), tmp_path, lambda _: None)
    assert not leftover.exists()
    leftover.write_text("")
    write_table(settings_of_table(1), rows, tmp_path, "")
    assert not leftover.parent.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [*TABLE, "--examples", "4", "--train-steps", "1"],
        ["bench", "--workloads", "small", "--rounds", "2", "--only", "statistics"],
        ["bench", "--scaling", "width", "--sizes", "width=32", "--rounds", "3"],
    ],
)
def test_one_process_at_a_time_writes_to_a_folder(arguments: list[str], tmp_path: Path) -> None:
    with locked(tmp_path):
        refused("another process is working in", *arguments, "--out", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*STREAM, "--lr", "0"], "lr must be a number above 0, got 0"),
        ([*STREAM, "--grid", "lr=0.1", "--grid", "lr=0.01"], "--grid gives lr twice"),
        ([*STREAM, "--seeds", "20000000000000"], "--seeds must be whole numbers of at most 1000000000000, got 2000"),
        ([*STREAM, "--seeds", "9" * 5000], "--seeds must be whole numbers of at most"),
        (["train", "digits-mlp", "--seed", "2" + 19 * "0"], "'--seed'"),
        (["analyse", "locations", "digits-cnn", "--seed", 20 * "9"], "'--seed'"),
        ([*TABLE, "--seed", 20 * "9"], "'--seed'"),
        (["train", "digits-mlp", "--device", "meta"], "device 'meta' is not usable"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(arguments: list[str], message: str, tmp_path: Path) -> None:
    refused(message, *arguments, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["verify", "rank", "spectrum", "autocorrelation"])
def test_analyses_name_a_seed_that_is_too_large(command: str) -> None:
    refused("'--seed'", "analyse", command, "digits-mlp", "--seed", 20 * "9")


def test_the_largest_seed_is_one_that_can_be_used(tmp_path: Path) -> None:
    code, _, stderr = call(*STREAM, "--strategies", "ewc", "--seeds", str(10**12), "--out", str(tmp_path / "1"))
    assert code == 0, stderr
    arguments = ["train", "digits-mlp", "--optimizer", "sgd", "--steps", "2", "--seed", str(10**12)]
    code, _, stderr = call(*arguments, "--out", str(tmp_path / "2"))
    assert code == 0, stderr


@pytest.mark.parametrize("option", ["--set", "--grid"])
def test_batches_beyond_the_training_set_are_refused_before_the_first_step(option: str, tmp_path: Path) -> None:
    arguments = ["compare", "digits-mlp", "--optimizers", "sgd,kfac", option, "kfac.batch_size=100000", "--steps", "2"]
    refused("kfac.batch_size must be at most the ", *arguments, "--out", str(tmp_path))
    assert not (tmp_path / "runs").exists()


def test_standard_output_in_ascii_shows_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr("kronfac.cli.app.app", lambda prog_name: print("1 ± 2", flush=True))
    main()
    assert written.getvalue().split() == [b"1", b"?", b"2"]


def test_ctrl_c_while_libraries_are_loaded_is_quiet() -> None:
    script = """
import contextlib, os, signal, sys, time
from kronfac.cli.main import main

class Stops:
    @staticmethod
    def find_spec(name, *_):
        if name == "kronfac.cli.app":
            with contextlib.suppress(KeyboardInterrupt):  # as torch does
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            raise RuntimeError("half of it is loaded")

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Stops)
main()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("train digits-mlp", "stopped; the same command goes on from the last checkpoint"),
        ("continual nope --fresh", "stopped; the same command without --fresh goes on from the last checkpoint"),
        ("analyse table", "stopped; the same command goes on from the last checkpoint"),
        ("reproduce kld-wrm", "stopped; the same command goes on from the last checkpoint"),
        ("sweep digits-mlp --trials 3", "stopped; the same command goes on from the last checkpoint"),
        ("analyse verify digits-mlp", "stopped"),
        ("bench", "stopped"),
        ("bench --scaling width", "stopped"),
        ("bench --scaling=width --out there", "stopped; the same command goes on from the last checkpoint"),
    ],
)
def test_what_is_said_of_a_command_that_was_stopped(arguments: str, line: str) -> None:
    assert how_to_go_on(arguments.split()) == line


def test_a_command_that_was_stopped_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "compare", interrupted)
    code, _, stderr = call("train", "digits-mlp", "--fresh", "--out", str(tmp_path))
    assert (code, stderr) == (130, "stopped; the same command without --fresh goes on from the last checkpoint\n")


def stop_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the run of that number, counted from 1."""
    count = 0

    def run(*arguments: object) -> dict[str, object]:
        nonlocal count
        count += 1
        if count == number:
            raise KeyboardInterrupt
        return runner.run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(plans, "run", run)


@pytest.mark.parametrize("grid", [[], ["--grid", "lr=0.01,0.02"]])
def test_a_stream_that_was_stopped_has_a_report(
    grid: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*STREAM, "--strategies", "finetune,l2", *grid, "--out", str(tmp_path)]
    total = 4 if grid else 2
    stop_at(1, monkeypatch)
    assert call(*arguments)[0] == 130
    refused("no run of kronfac continual is done", "report", str(tmp_path))
    stop_at(2, monkeypatch)
    assert call(*arguments)[0] == 130
    code, stdout, stderr = call("report", str(tmp_path))
    assert code == 0, stderr
    assert f"finished: 1 of {total} runs\n" in stdout
    assert "fine-tuning" in stdout
    assert f"Finished: 1 of {total} runs." in (tmp_path / "report.html").read_text()
    stop_at(0, monkeypatch)
    code, stdout, _ = call(*arguments)
    assert code == 0
    assert "finished:" not in stdout
    assert call("report", str(tmp_path)) == (0, stdout, "")


def test_a_stream_begun_beside_a_finished_search_leaves_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*STREAM, "--strategies", "finetune", "--out", str(tmp_path)]
    assert call(*arguments, "--grid", "lr=0.01,0.02")[0] == 0
    stop_at(1, monkeypatch)
    assert call(*arguments)[0] == 130
    code, stdout, _ = call("report", str(tmp_path))
    assert code == 0
    assert "chosen by the newest task" in stdout


def test_a_folder_without_runs_names_the_files_that_tell(tmp_path: Path) -> None:
    refused("comparison.json, strategies.json or grid.json", "report", str(tmp_path))


def test_metrics_are_whole_after_a_kill_between_checkpoint_and_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = continual.Plan("permuted-digits", "finetune", 0.0, 0.0, "none", 2, 2, 0, 0.001, 100, 0)
    write_text = runner.write_text

    def killed(path: Path, text: str) -> None:
        if path.name == "metrics.jsonl" and text.count("\n") == 2:
            raise KeyboardInterrupt
        write_text(path, text)

    monkeypatch.setattr(runner, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        runner.run(plan, tmp_path)
    monkeypatch.setattr(runner, "write_text", write_text)
    matrix: Sequence[object] = runner.run(plan, tmp_path)["matrix"]  # type: ignore[assignment]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["accuracies"] for line in lines] == matrix
