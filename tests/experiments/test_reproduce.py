"""The study of Puiu (2022): network, pooling, rows, the table's rules, and processes that stop and go on."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from kronfac.experiments.errors import ExperimentError, UnknownNameError
from kronfac.experiments.models import puiu_network
from kronfac.experiments.models.pooling import MaxPool2x2
from kronfac.experiments.problems import get_problem
from kronfac.experiments.reproduce.kld_wrm.archive import take_runs, write_runs
from kronfac.experiments.reproduce.kld_wrm.rows import COLUMNS, ROWS, choose
from kronfac.experiments.reproduce.kld_wrm.study import make_study, reproduce
from kronfac.experiments.reproduce.kld_wrm.table import as_rows, summarise, view, write_tables
from kronfac.experiments.results import RunResult, read_run


def test_the_network_has_the_papers_size() -> None:
    model = puiu_network()
    assert sum(p.numel() for p in model.parameters()) == 4712
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert isinstance(model[-2], nn.Dropout)


# ----------------------------------------------------------------------------------------------------------- pooling
def maps_with_ties() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-2, 3, (6, 3, 8, 10), generator=generator).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_is_that_of_torch_bit_for_bit_with_ties(dtype: torch.dtype) -> None:
    maps = maps_with_ties().to(dtype)
    weights = torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = []
    for pool in (MaxPool2x2(), nn.MaxPool2d(2)):
        x = maps.clone().requires_grad_()
        y = pool(x)
        found.append((y, torch.autograd.grad((weights * y).sum(), x)[0]))
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_pooling_pushes_tangents_forward_where_it_pulls_gradients_back() -> None:
    maps = maps_with_ties().double()
    tangent = torch.randn(maps.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    value, pushed = torch.func.jvp(MaxPool2x2(), (maps,), (tangent,))
    x = maps.clone().requires_grad_()
    for cotangent in torch.randn(3, *value.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)):
        (pulled,) = torch.autograd.grad((cotangent * MaxPool2x2()(x)).sum(), x)
        assert torch.allclose((cotangent * pushed).sum(), (pulled * tangent).sum(), rtol=1e-12)
    batched = torch.func.vmap(MaxPool2x2())(maps)
    assert torch.equal(batched, nn.MaxPool2d(2)(maps))


def test_pooling_refuses_odd_sides() -> None:
    with pytest.raises(ValueError, match=r"even sides, got \(1, 1, 7, 8\)"):
        MaxPool2x2()(torch.zeros(1, 1, 7, 8))


# -------------------------------------------------------------------------------------------------------------- rows
def test_rows_are_the_papers() -> None:
    assert len([row for row in ROWS.values() if row.paper]) == 16
    assert [row.key for row in choose(["qe"])] == ["qe-0.04", "qe-0.07", "qe-0.1", "qe-0.04-rho-0.7"]
    long = ROWS["qe-0.04-rho-0.7"]
    assert [long.values[name] for name in ("rho", "omega", "n_inner", "n_cap")] == [0.7, 0.04, 7, 8]
    assert long.title == "QE-KLD-WRM, ρ = 0.7, ω = 0.04, N_IS = 7, N_cap = 8"
    assert long.paper == ("8", "6", "0", "0", "0", "97.85", "0.60", "0.29", "0.03")
    assert ROWS["so-0.33-each"].values["factor_damping"] == 0.01
    assert [row.key for row in choose(["so"])] == ["so-0.33", "so-0.5", "so-0.7", "so-0.8"]
    assert all(len(row.paper) in (0, len(COLUMNS)) for row in ROWS.values())
    best = [row.key for row in choose(["best"])]
    assert best == ["kfac-0.95", "so-0.33", "q-0.5", "qe-0.07", "kfac-ours"]
    assert [row.key for row in choose(["q-0.5", "so", "so-0.5"])] == ["so-0.33", "so-0.5", "so-0.7", "so-0.8", "q-0.5"]
    with pytest.raises(UnknownNameError, match="unknown row 'nope'; known: all, best"):
        choose(["nope"])


def test_every_row_is_of_the_papers_length_and_batch() -> None:
    study = make_study(["all"], 10, 50, "mnist")
    settings = study.all_settings()
    assert len(settings) == 170
    assert {s.steps for s in settings} == {5850}
    assert get_problem("mnist-puiu").batch_size == 512
    assert len({s.folder_name for s in settings}) == 170
    assert [s.seed for s in settings[:18]] == [0] * 17 + [1]


# ------------------------------------------------------------------------------------------------------------- table
def run_of(status: str, *evaluations: tuple[float, float]) -> RunResult:
    settings = make_study(["so-0.33"], 1, 1, "digits").all_settings()[0]
    records = [
        {"epoch": float(i), "seconds": 60.0 * i, "test_error": error, "test_loss": loss, "train_loss": loss}
        for i, (error, loss) in enumerate(evaluations)
    ]
    return RunResult(settings, status, "", records)


def test_thresholds_count_when_met_twice_and_moments_are_of_the_last_epoch(tmp_path: Path) -> None:
    runs = [
        run_of("done", (50.0, 1.0), (2.0, 0.25), (2.0, 0.2), (4.0, 0.3)),  # 98 % twice, more than 98 % never
        run_of("done", (50.0, 1.0), (1.5, 0.3), (1.9, 0.19), (2.0, 0.1)),
        run_of("diverged", (50.0, 1.0)),
        run_of("unfinished", (50.0, 1.0), (1.0, 0.1), (1.0, 0.1)),
    ]
    summary = summarise(ROWS["so-0.33"], runs)
    assert (summary.runs, summary.diverged, summary.planned, summary.minutes) == (2, 1, 4, 3.0)
    figures = dict(zip(COLUMNS, summary.figures, strict=True))
    counts = [figures[name] for name in COLUMNS[:5]]
    assert counts == [2, 1, 0, 2, 1]
    assert figures["μ acc"] == pytest.approx(97.0)
    assert figures["σ acc"] == pytest.approx(2**0.5)
    assert figures["μ loss"] == pytest.approx(0.2)
    table = view([summary])
    assert table.rows[0][:4] == ["SO-KLD-WRM, ρ = 0.33", "2 of 4, 1 diverged", "2 (4)", "1 (2)"]
    write_tables(tmp_path, [summary], 3)
    assert "| SO-KLD-WRM, ρ = 0.33 | 2 of 4, 1 diverged | 2 (4) |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "table.csv").read_text().startswith("row,solver,settings,runs,diverged,planned,minutes,acc ≥")
    assert as_rows([summary])[0]["paper: σ acc"] == "0.85"


def test_a_table_without_runs_is_dashes() -> None:
    summary = summarise(ROWS["kfac-ours"], [run_of("unfinished")])
    assert view([summary]).rows[0][2:] == ["–"] * len(COLUMNS)


# ----------------------------------------------------------------------------------------------------------- archive
def finished(seed: int, last: float = 1.0) -> RunResult:
    settings = make_study(["so-0.33"], 3, 2, "digits").all_settings()[seed]
    records = [
        {
            "step": step,
            "epoch": step / 2,
            "seconds": 0.1 + step,
            "train_loss": 1 / 3,
            "train_error": 3.0,
            "test_loss": last,
            "test_error": 2.0,
        }
        for step in (2, settings.steps)
    ]
    return RunResult(settings, "done", "", records)


def test_published_runs_count_elsewhere_with_every_digit(tmp_path: Path) -> None:
    runs = [finished(0), finished(1, 2 / 3)]
    unfinished = RunResult(finished(2).settings, "unfinished", "", finished(2).evaluations)
    write_runs(tmp_path, {"so-0.33": [*runs, unfinished]})
    wanted, other = [run.settings for run in (*runs, unfinished)], tmp_path / "other"
    assert take_runs(tmp_path / "runs.csv", other, wanted) == 2
    taken = [read_run(other, settings) for settings in wanted]
    assert [run.status for run in taken] == ["done", "done", "unfinished"]
    assert taken[0].note == "taken from runs.csv"
    assert [run.evaluations for run in taken[:2]] == [run.evaluations for run in runs]
    assert take_runs(tmp_path / "runs.csv", other, wanted) == 0
    write_runs(tmp_path / "none", {"so-0.33": [unfinished]})
    assert not (tmp_path / "none").exists()


def test_names_of_published_runs_stay() -> None:
    """Or nobody could add to them: a new hyper-parameter is ``later``."""
    study = make_study(["all"], 10, 50, "mnist")
    names = {(key, seed): study.settings(ROWS[key], seed).folder_name for key in study.rows for seed in range(10)}
    with (Path(__file__).parents[2] / "docs" / "figures" / "kld-wrm-runs.csv").open(newline="") as file:
        published = {(line["row"], int(line["seed"])): line["run"] for line in csv.DictReader(file)}
    assert len(published) >= 30
    assert published.items() <= names.items()
    other = replace(study.settings(ROWS["q-0.5"], 0), hyperparameters={"stats_examples": 8})
    assert other.folder_name != replace(other, hyperparameters={"stats_examples": None}).folder_name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("test_loss", "loss"), "is no table of runs: it has no columns test_loss"),
        (lambda text: text.replace("0.3333333333333333", "a third", 1), "line 2: could not convert"),
        (lambda text: "\n".join(text.splitlines()[:2]), "ends at step 2, not"),
    ],
)
def test_a_damaged_table_of_runs_is_refused(change: Callable[[str], str], message: str, tmp_path: Path) -> None:
    write_runs(tmp_path, {"so-0.33": [finished(0)]})
    path = tmp_path / "runs.csv"
    path.write_text(change(path.read_text()))
    with pytest.raises(ExperimentError, match=message):
        take_runs(path, tmp_path / "other", [finished(0).settings])
    with pytest.raises(ExperimentError, match="cannot read"):
        take_runs(tmp_path / "absent.csv", tmp_path / "other", [])
    assert not (tmp_path / "other").exists()


# ------------------------------------------------------------------------------------------------------------- runs
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": []}, "no row is named"),
        ({"runs": 0}, "runs must be at least 1, got 0"),
        ({"epochs": -1}, "epochs must be at least 1, got -1"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"data": "svhn"}, "unknown data 'svhn'; known: mnist, digits"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=message):
        reproduce(out=tmp_path, **arguments)  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())
