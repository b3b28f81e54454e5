from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.calls import call

pytest.importorskip("optuna")

SMALL = ["--steps", "6", "--evaluate-every", "3", "--trials", "3", "--threads", "1"]


def test_a_sweep_ends_in_tables_and_a_report(tmp_path: Path) -> None:
    arguments = ["sweep", "digits-mlp", "--optimizers", "sgd,kfac", "--range", "kfac.lr=0.01:0.3", *SMALL]
    code, stdout, stderr = call(*arguments, "--out", str(tmp_path))
    assert code == 0, stderr
    assert "Trials of sgd" in stdout
    assert "Trials of kfac" in stdout
    assert "sgd: best of 3 points is lr=" in stderr + stdout
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "grid-kfac-lr.png").is_file()
    code, again, _ = call(*arguments, "--out", str(tmp_path), "--json")
    assert code == 0
    assert len(json.loads(again)["plan"]["tried"]["kfac"]) == 3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--range", "kfac.lr=1:0.1"], "a range is low:high"),
        (["--range", "lr=0.1:1"], "optimiser.name=value"),
        (["--range", "adamw.lr=0.1:1"], "a range is given for 'adamw'"),
        (["--range", "kfac.source=sampled,foo"], "kfac.source must be one of"),
        (["--trials", "0"], "trials must be a whole number of at least 1"),
    ],
)
def test_bad_sweeps(tmp_path: Path, arguments: list[str], text: str) -> None:
    out = tmp_path / "out"
    code, _, stderr = call("sweep", "digits-mlp", "--optimizers", "sgd,kfac", *SMALL, *arguments, "--out", str(out))
    assert code == 2
    assert text in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert not out.exists()
