"""Folders whose files cannot be written, or hold what this version does not know."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from tests.cli.calls import call

from kronfac import experiments

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("plotly")


def refused(message: str, *arguments: str) -> None:
    code, stdout, stderr = call(*arguments)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert message in stderr


@pytest.mark.parametrize("text", ["{}", '{"status": "done", "note": "", "step": "x", "seconds": 1.0}'])
def test_a_result_that_says_nothing_is_named(tmp_path: Path, text: str) -> None:
    arguments = ["train", "digits-mlp", "--optimizer", "sgd", "--steps", "2", "--threads", "1", "--out", str(tmp_path)]
    assert call(*arguments)[0] == 0
    path = next((tmp_path / "runs").iterdir()) / "result.json"
    path.write_text(text)
    refused(f"{path} does not say how a run ended; delete it", "report", str(tmp_path))
    code, _, stderr = call(*arguments)
    assert code == 2
    assert "does not say how a run ended" in stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizers": ["later"]}, "unknown optimiser 'later'"),
        ({"metric": "later"}, "unknown metric of digits-mlp 'later'"),
        ({"hyperparameters": {}}, "the plan has no hyper-parameters of sgd"),
    ],
)
def test_the_folder_of_a_later_version_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    experiments.compare("digits-mlp", ["sgd"], steps=2, out=tmp_path, threads=1)
    content = json.loads((tmp_path / "comparison.json").read_text())
    (tmp_path / "comparison.json").write_text(json.dumps(content | {"plan": content["plan"] | change}))
    refused(message, "report", str(tmp_path))


@pytest.mark.parametrize("name", ["metrics.jsonl", "settings.json", "report.html"])
def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def full(number: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(errno.ENOSPC, "No space left on device")

    if not Path("/proc/self/fd").exists():
        pytest.skip("no way to know which file is meant")
    monkeypatch.setattr(os, "fsync", full)
    arguments = ["--optimizer", "sgd", "--steps", "2", "--threads", "1", "--out", str(tmp_path)]
    code, _, stderr = call("train", "digits-mlp", *arguments)
    assert code == 2
    assert stderr.splitlines()[-1].startswith(f"kronfac: error: cannot write {tmp_path}")
    assert stderr.splitlines()[-1].endswith(f"{name}: No space left on device")


def test_output_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    experiments.compare("digits-mlp", ["sgd"], steps=2, out=tmp_path, threads=1)
    monkeypatch.setattr("kronfac.cli.outcome.print_table", full)
    refused("No space left on device", "report", str(tmp_path))


def test_a_lock_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    refused(f"cannot write {tmp_path / '.lock'}", "train", "digits-mlp", "--steps", "2", "--out", str(tmp_path))
