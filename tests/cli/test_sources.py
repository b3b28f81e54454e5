"""The root probe by the name ``root``, and samples that no source draws."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from tests.cli.calls import call

from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.optimizers import OPTIMIZERS
from kronfac.experiments.optimizers.options import own_values
from kronfac.experiments.problems import get_problem
from kronfac.experiments.sources import named_source, named_sources
from kronfac.sources import Sampled

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("pandas")
ONE_LAYER = ["--approximations", "kfac", "--layers", "4", "--examples", "20"]
WITH_SOURCE = [name for name, spec in OPTIMIZERS.items() if "source" in {option.name for option in spec.options}]


def test_root_is_the_root_probe() -> None:
    source = named_source("root", 3)
    assert isinstance(source, Sampled)
    assert (source.name, source.probe, source.count) == ("root", "root", 3)
    drawn, exact = named_sources(["sampled", "exact"], 2)
    assert isinstance(drawn, Sampled)
    assert (drawn.probe, drawn.count, exact.name) == ("labels", 2, "exact")


def test_a_source_named_twice_is_refused() -> None:
    with pytest.raises(ExperimentError, match="source 'root' is named twice"):
        named_sources(["root", "exact", "root"])


@pytest.mark.parametrize("name", WITH_SOURCE)
def test_every_optimiser_with_a_source_takes_root(name: str) -> None:
    problem, spec = get_problem("digits-mlp"), OPTIMIZERS[name]
    values = spec.resolve({"source": "root"})
    assert values["source"] == "root"  # which the settings of a run hold
    assert own_values(values)["source"] == "root"
    spec.build(problem.model(0), problem, values, torch.Generator())


def test_rows_of_both_probes_stand_beside_each_other(tmp_path: Path) -> None:
    arguments = ["analyse", "error", "digits-mlp", "--sources", "sampled,root", *ONE_LAYER, "--out", str(tmp_path)]
    assert call(*arguments)[0] == 0
    with (tmp_path / "error.csv").open() as file:
        errors = {row["source"]: row["error"] for row in csv.DictReader(file) if row["layer"] == "4"}
    assert list(errors) == ["sampled", "root"]
    assert errors["sampled"] != errors["root"]


def test_alignment_takes_root_in_its_methods(tmp_path: Path) -> None:
    methods = "kfac:root,kfac:root:factored,kfac:sampled"
    options = ["--steps", "0", "--examples", "20", "--blocks-only", "--approximations", methods, "--samples", "2"]
    code, stdout, _ = call("analyse", "alignment", "digits-mlp", *options, "--out", str(tmp_path))
    assert code == 0
    assert {"kfac:root", "kfac:root:factored", "kfac:sampled"} <= set(stdout.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["error", "--sources", "exact", *ONE_LAYER],
        ["matrices", "--layer", "4"],
        ["training", "--steps", "1"],
        ["alignment", "--approximations", "kfac:exact", "--steps", "0"],
    ],
)
def test_samples_that_nothing_draws_are_refused(arguments: list[str], tmp_path: Path) -> None:
    command, *options = arguments
    out = tmp_path / "out"
    code, stdout, stderr = call("analyse", command, "digits-mlp", *options, "--samples", "2", "--out", str(out))
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert "samples=2 is for the sources sampled and root, not for exact" in stderr
