"""Reports of self-tuning optimisers: in the metrics, as a picture, and for TensorBoard."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from kronfac import experiments
from kronfac.experiments.diagnostics import draw_diagnostics, write_tensorboard
from kronfac.experiments.results import Results, run_folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("runs") / "digits"
    return experiments.compare("digits-mlp", ["adaptive_kfac", "sgd"], out=out, steps=12, evaluate_every=6)


def test_each_step_is_reported(results: Results) -> None:
    from kronfac.experiments.records import read_records

    adaptive, sgd = (
        [r for r in read_records(run_folder(results.folder, run.settings) / "metrics.jsonl") if r["step"] > 0]
        for run in results.runs
    )
    assert len(adaptive) == 12
    assert all({"step_lam", "step_gamma", "step_alpha", "step_predicted", "step_kl"} <= set(r) for r in adaptive)
    assert "step_rho" in adaptive[0]
    assert not any(key.startswith("step_") for r in sgd for key in r)


def test_the_picture_is_there_for_runs_with_reports(results: Results) -> None:
    (path,) = draw_diagnostics(results)
    assert path.name == "diagnostics-adaptive_kfac-0.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_tensorboard_where_it_is_installed(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert write_tensorboard(results) is None
    written: dict[str, list[Any]] = {}

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            self.scalars = written.setdefault(Path(folder).name, [])

        def __enter__(self) -> SummaryWriter:
            return self

        def __exit__(self, *error: object) -> None:
            self.scalars.append("closed")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.scalars.append((name, step))

    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    assert write_tensorboard(results) == results.folder / "tensorboard"
    (scalars,) = written.values()
    assert ("lam", 1) in scalars
    assert ("norm", 12) in scalars
    assert scalars[-1] == "closed"
