"""SOAP as a rival: asked for by name, from a library that need not be there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kronfac import experiments
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.problems import get_problem
from kronfac.experiments.progress import Progress


class StandIn(torch.optim.SGD):
    """Takes what SOAP takes, and descends plainly."""

    asked: dict[str, Any]

    def __init__(self, params: Any, lr: float, **options: Any) -> None:
        StandIn.asked = options
        super().__init__(params, lr=lr)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("pytorch_optimizer")
    library.SOAP = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", library)


def test_without_the_library_the_error_names_the_extra_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ExperimentError, match=r"pip install 'kronfac\[rivals\]'"):
        experiments.compare("digits-mlp", ["sgd", "soap"], steps=2, out=tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()
    spec, problem = get_optimizer("soap"), get_problem("digits-mlp")
    with pytest.raises(ExperimentError, match="pytorch_optimizer"):
        spec.build(problem.model(0), problem, spec.resolve(), torch.Generator())


@pytest.mark.usefixtures("stand_in")
def test_values_are_handed_on_by_the_names_of_the_library(tmp_path: Path) -> None:
    values = {"soap": {"lr": 0.01, "refresh_every": 5, "max_width": 50, "beta1": 0.9}}
    results = experiments.compare(
        "digits-mlp", ["soap"], steps=4, evaluate_every=2, hyperparameters=values, out=tmp_path, threads=1
    )
    assert [run.status for run in results.runs] == ["done"]
    assert StandIn.asked == {
        "betas": (0.9, 0.95),
        "precondition_frequency": 5,
        "max_precondition_dim": 50,
        "shampoo_beta": None,
        "eps": 1e-8,
        "weight_decay": 0.01,
    }
    assert list(experiments.summary(results)["optimizer"]) == ["SOAP"]


def test_soap_trains_and_resumes_bit_for_bit(
    tmp_path: Path, metrics_of: Callable[[Path], list[dict[str, float]]]
) -> None:
    pytest.importorskip("pytorch_optimizer")

    class Stop(Progress):
        def stepped(self, step: int, seconds: float, batch_loss: float) -> None:
            if step == 17:
                raise KeyboardInterrupt

    def run(name: str, progress: Progress | None = None) -> experiments.Results:
        return experiments.compare(
            "digits-mlp",
            ["soap"],
            steps=30,
            out=tmp_path / name,
            threads=1,
            checkpoint_every=0.0,
            progress=progress,
        )

    [whole] = run("whole").runs
    assert whole.evaluations[-1]["train_loss"] < 0.9 * whole.evaluations[0]["train_loss"]
    with pytest.raises(KeyboardInterrupt):
        run("stopped", Stop())
    run("stopped")
    assert json.dumps(metrics_of(tmp_path / "stopped")) == json.dumps(metrics_of(tmp_path / "whole"))
