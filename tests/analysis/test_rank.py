"""The rank of mini-batches' curvature (Botev et al. 2017, appendix D)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from tests.exactness_helpers import double, draw
from torch import nn
from typer.testing import CliRunner

import kronfac as kf
from kronfac import plots
from kronfac.analysis import monte_carlo_rank
from kronfac.cli.main import app


def net(outputs: int) -> nn.Module:
    return double(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)))


def matrix_rank(matrix: torch.Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix, hermitian=True))


@pytest.mark.parametrize(
    ("likelihood", "outputs", "output_rank"),
    [(kf.Bernoulli(), 1, 1), (kf.Categorical(), 3, 2), (kf.Gaussian(), 3, 3), (kf.Bernoulli(), 2, 2)],
)
def test_ranks_stay_below_their_bounds_and_are_those_of_the_oracle(
    likelihood: kf.Likelihood, outputs: int, output_rank: int
) -> None:
    model, x = net(outputs), draw(24, 4)
    rows = monte_carlo_rank(model, likelihood, x, batch_sizes=[1, 3, 24], samples=2)
    parameters = sum(p.numel() for p in model.parameters())
    exact = kf.reference.ggn(model, likelihood, x)
    assert [row["batch_size"] for row in rows] == [1, 3, 24]
    for row in rows:
        n = row["batch_size"]
        assert row["parameters"] == parameters
        assert row["batch_ggn_bound"] == min(parameters, n * output_rank)
        assert row["batch_sampled_bound"] == min(parameters, n * 2, n * output_rank)
        assert 0 < row["batch_sampled"] <= row["batch_sampled_bound"]
        assert row["batch_sampled"] <= row["batch_ggn"] <= row["batch_ggn_bound"]
        assert row["all_ggn"] == matrix_rank(exact)
    assert rows[-1]["batch_ggn"] == rows[-1]["all_ggn"]
    # The bounds are met where there are many more parameters than examples.
    assert rows[1]["batch_ggn"] == rows[1]["batch_ggn_bound"]
    assert rows[0]["batch_ggn"] < rows[1]["batch_ggn"] < rows[-1]["batch_ggn"]


def test_more_samples_see_more() -> None:
    model, x = net(4), draw(6, 4)
    one, many = (monte_carlo_rank(model, kf.Gaussian(), x, batch_sizes=[3], samples=s)[0] for s in (1, 8))
    assert one["batch_sampled"] == one["batch_sampled_bound"] == 3
    assert many["batch_sampled"] == many["batch_ggn"] == 12


def test_one_layer_alone() -> None:
    model, x = net(1), draw(6, 4)
    (row,) = monte_carlo_rank(model, kf.Bernoulli(), x, batch_sizes=[6], parameters=["2.bias"])
    assert row == {
        "batch_size": 6,
        "samples": 1,
        "parameters": 1,
        "all_ggn": 1,
        "batch_ggn": 1,
        "batch_ggn_bound": 1,
        "batch_sampled": 1,
        "batch_sampled_bound": 1,
    }


def test_ignored_examples_have_no_rank() -> None:
    model, x = net(3), draw(4, 4)
    y = torch.tensor([0, -100, -100, 1])
    (row,) = monte_carlo_rank(model, kf.Categorical(ignore_index=-100), x, y, batch_sizes=[4])
    assert row["batch_ggn"] == row["batch_ggn_bound"] == 4
    assert row["batch_sampled"] == 2


@pytest.mark.parametrize("likelihood", [kf.Bernoulli(), kf.Gaussian()], ids=repr)
def test_one_number_an_example_may_come_without_a_dimension(likelihood: kf.Likelihood) -> None:
    model, x = net(1), draw(6, 4)
    flat = nn.Sequential(*model, nn.Flatten(0))
    found, wanted = (monte_carlo_rank(m, likelihood, x, batch_sizes=[1, 4], samples=2) for m in (flat, model))
    assert found == wanted
    assert [row["batch_ggn"] for row in found] == [1, 4]


@pytest.mark.parametrize("flat", [False, True])
def test_masked_examples_have_no_rank(flat: bool) -> None:
    model, x = net(1), draw(6, 4)
    model = nn.Sequential(*model, nn.Flatten(0)) if flat else model
    mask = torch.arange(6) % 3 == 0
    for targets in ((draw(*model(x).shape).sigmoid(), mask), (None, mask)):
        (row,) = monte_carlo_rank(model, kf.Bernoulli(), x, targets, batch_sizes=[6])
        assert row["all_ggn"] == row["batch_ggn"] == row["batch_ggn_bound"] == row["batch_sampled"] == 2


def test_batches_keep_the_weights_of_their_examples() -> None:
    """One row of the mask may stand for all examples, and rows go where the batches' examples go."""
    model, x = net(3), draw(6, 4)
    one, each = torch.tensor([[True, False, True]]), torch.tensor([[True, False, True]]).expand(6, 3)
    rows = [monte_carlo_rank(model, kf.Gaussian(), x, (None, mask), batch_sizes=[1, 3]) for mask in (one, each)]
    assert rows[0] == rows[1]
    assert [row["batch_ggn_bound"] for row in rows[0]] == [2, 6]
    for kept in range(6):
        alone = torch.arange(6) == kept
        found = monte_carlo_rank(model, kf.Gaussian(), x, (None, alone), batch_sizes=[1, 2, 3, 4, 5, 6])
        ranks = [row["batch_ggn"] for row in found]
        assert set(ranks) <= {0, 3}
        assert ranks == sorted(ranks)
        assert ranks == [row["batch_ggn_bound"] for row in found]
        assert ranks[-1] == 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_sizes": [0]}, "batch_sizes: 0 is no integer from 1 to the 4"),
        ({"batch_sizes": [5]}, "batch_sizes: 5 is no integer"),
        ({"batch_sizes": []}, "batch_sizes is empty"),
        ({"batch_sizes": [2], "samples": 0}, "samples=0 must be"),
        ({"batch_sizes": [2], "parameters": ["nope"]}, r"no trained parameters \['nope'\]"),
    ],
)
def test_bad_arguments_are_named(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        monte_carlo_rank(net(1), kf.Bernoulli(), draw(4, 4), **options)


def test_targets_of_another_kind_are_named() -> None:
    with pytest.raises(TypeError, match=r"a pair \(targets, mask\) of tensors, got tuple"):
        monte_carlo_rank(net(1), kf.Bernoulli(), draw(4, 4), (None, None), batch_sizes=[2])  # type: ignore[arg-type]


def test_coupled_examples_are_refused() -> None:
    model = double(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match="couples the examples"):
        monte_carlo_rank(model, kf.Gaussian(), draw(4, 4), batch_sizes=[2])
    monte_carlo_rank(model.eval(), kf.Gaussian(), draw(4, 4), batch_sizes=[2])


def test_the_picture_has_ranks_bounds_and_the_whole() -> None:
    rows = monte_carlo_rank(net(1), kf.Bernoulli(), draw(8, 4), batch_sizes=[4, 1, 8])
    axes = plots.rank_curves(rows, title="ranks")
    assert isinstance(axes, Axes)
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines["Gauss-Newton of the batch"].get_xdata().tolist() == [1, 4, 8]
    assert lines["Gauss-Newton of the batch: bound"].get_ydata().tolist() == [1, 4, 8]
    assert lines["Gauss-Newton of all data"].get_ydata()[0] == rows[0]["all_ggn"]
    with pytest.raises(ValueError, match="at least one row"):
        plots.rank_curves([])


def test_the_command_writes_picture_table_and_json(tmp_path: Path) -> None:
    out = tmp_path / "rank"
    arguments = ["--examples", "12", "--batch-sizes", "1,2,12", "--layer", "4", "--out", str(out), "--json"]
    result = CliRunner().invoke(app, ["analyse", "rank", "digits-mlp", *arguments])
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told == json.loads((out / "rank.json").read_text())
    assert [row["batch_size"] for row in told["rows"]] == [1, 2, 12]
    assert [row["batch_ggn_bound"] for row in told["rows"]] == [9, 18, 108]
    assert (out / "rank.png").read_bytes().startswith(b"\x89PNG")
    header, *lines = (out / "rank.csv").read_text().splitlines()
    assert header.startswith("batch_size,samples,parameters")
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--layer", "7"], "no layer '7' with trained parameters; known: 0, 2, 4"),
        (["--batch-sizes", "1,x"], "--batch-sizes must be whole numbers above 0"),
        (["--examples", "3", "--batch-sizes", "4", "--layer", "4"], "4 is no integer from 1 to the 3 examples"),
    ],
)
def test_the_command_names_bad_input(arguments: list[str], text: str) -> None:
    result = CliRunner().invoke(app, ["analyse", "rank", "digits-mlp", *arguments])
    assert result.exit_code == 2
    assert text in result.stderr
