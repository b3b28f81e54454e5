"""What `coverage` says agrees with what estimation, inversion and the optimiser then do."""

from __future__ import annotations

import builtins
import json
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw
from torch import Tensor, nn

import kronfac as kf
from kronfac.approximations import Approximation, Mean, Statistic
from kronfac.approximations.base import zeros
from kronfac.blocks import Block
from kronfac.experiments.models import ResNet
from kronfac.layers import LayerAdapter


def grouped() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(24, 5), nn.Linear(5, 3)
    )


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.table(x)).mean(1))


def bytes_of(tensors: dict[str, Tensor]) -> int:
    # Numbers alone (the log-determinant, the scale of each group) are no memory to speak of, and not counted.
    return sum(t.numel() * t.element_size() for name, t in tensors.items() if t.ndim and name != "delta")


@pytest.mark.parametrize("rule", ["factored", "exact"])
@pytest.mark.parametrize("approximation", ["kfac", "tkfac", "dense", "diagonal", "sua", "prong"])
@pytest.mark.parametrize(
    ("model", "x"), [(grouped(), draw(7, 4, 4, 4)), (Words(), torch.arange(14).reshape(7, 2) % 11)]
)
def test_memory_is_what_blocks_and_inverses_take(model: nn.Module, x: Tensor, approximation: str, rule: str) -> None:
    model = double(model).eval()
    report = kf.coverage(model, approximation=approximation, damping_rule=rule)
    curvature = kf.estimate(model, kf.Categorical(), [(x, torch.arange(7) % 3)], approximation=approximation)
    inverse = curvature.factorise(1e-2, rule)
    assert report.factor_memory == sum(bytes_of(block.tensors()) for block in curvature.blocks.values())
    assert report.inverse_memory == sum(bytes_of(entry.tensors()) for entry in inverse.inverses.values())
    assert report.memory == report.factor_memory + report.inverse_memory
    assert report.covered == curvature.parameter_names
    half = kf.coverage(model, approximation=approximation, damping_rule=rule, dtype=torch.float32)
    assert 2 * half.memory == report.memory


@pytest.mark.parametrize("rule", ["factored", "exact"])
@pytest.mark.parametrize(
    ("model", "x"), [(grouped(), draw(7, 4, 4, 4)), (Words(), torch.arange(14).reshape(7, 2) % 11)]
)
def test_memory_of_ekfac_is_that_of_a_running_optimiser(model: nn.Module, x: Tensor, rule: str) -> None:
    model = double(model).train()
    report = kf.coverage(model, approximation="ekfac", damping_rule=rule)
    optimizer = kf.optim.EKFAC(model, kf.Categorical(), lr=0.1, kl_clip=None)
    nn.functional.cross_entropy(model(x), torch.arange(7) % 3).backward()
    optimizer.step()
    statistics = optimizer._estimator.statistics.values()
    totals = [{key: mean.total for key, mean in statistic.means().items()} for statistic in statistics]
    assert report.factor_memory == sum(map(bytes_of, totals)) + sum(bytes_of(s.constants()) for s in statistics)
    shared = {tensor.data_ptr() for statistic in statistics for tensor in statistic.constants().values()}
    own = [t for i in optimizer._inverses.values() for t in i.tensors().values() if t.data_ptr() not in shared]
    assert report.inverse_memory == bytes_of(dict(enumerate(own)))  # type: ignore[arg-type]


def test_rows_of_ekfac() -> None:
    rows = {row.parameter: row for row in kf.coverage(grouped().eval(), approximation="ekfac").rows}
    conv = rows["0.weight"]
    assert (conv.block, conv.factors, conv.state) == (
        "eigen-kronecker",
        "2 of 19x19 (x) 3x3, 2x3x19 values",
        "approximate",
    )
    assert conv.reason.startswith("gradients uncorrelated in the eigenbasis")
    assert conv.factor_bytes == 4 * (2 * 2 * (19**2 + 3**2) + 2 * 3 * 19)
    assert rows["1.weight"].state == "exact"


def test_rows_name_kind_sizes_and_reason() -> None:
    model = grouped().eval()
    model[4].weight.requires_grad_(False)
    rows = {row.parameter: row for row in kf.coverage(model).rows}
    assert list(rows) == [name for name, _ in model.named_parameters()]
    conv = rows["0.weight"]
    assert (conv.layer, conv.layer_type, conv.shape, conv.entries) == ("0", "Conv2d", (6, 2, 3, 3), 108)
    assert (conv.block, conv.factors, conv.state) == ("kronecker", "2 of 19x19 (x) 3x3", "approximate")
    assert "positions as uncorrelated" in conv.reason
    assert conv.factor_bytes == 2 * (19**2 + 3**2) * 4
    assert rows["0.bias"].factor_bytes == 0, "memory of a layer is counted once"
    assert (rows["1.weight"].block, rows["1.weight"].factors) == ("dense per unit", "6 of 2x2")
    assert rows["1.weight"].state == "exact"
    assert "(eval mode)" in rows["1.weight"].reason
    assert (rows["4.weight"].block, rows["4.weight"].state) == ("frozen", "none")
    assert rows["4.bias"].factors == "1x1 (x) 5x5"
    assert rows["5.weight"].factors == "6x6 (x) 3x3"


def test_embedding_keeps_a_diagonal_input_factor() -> None:
    row = kf.coverage(nn.Embedding(1000, 8)).rows[0]
    assert (row.block, row.factors) == ("kronecker, diagonal input", "diag 1000 (x) 8x8")
    assert row.factor_bytes == (1000 + 64) * 4


def test_batch_norm_in_train_mode_makes_every_block_approximate() -> None:
    report = kf.coverage(grouped().train(), approximation="dense")
    assert {row.state for row in report.rows} == {"approximate"}
    assert all("couples" in row.reason for row in report.rows)
    assert {row.state for row in kf.coverage(grouped().eval(), approximation="dense").rows} == {"exact"}


def test_reduced_bias_alone_is_exact() -> None:
    layer = nn.Linear(4, 3)
    layer.weight.requires_grad_(False)
    states = {sharing: kf.coverage(layer, sharing=sharing).rows[1].state for sharing in ("expand", "reduce")}
    assert states == {"expand": "approximate", "reduce": "exact"}


def test_full_norm_blocks() -> None:
    report = kf.coverage(nn.LayerNorm(5), norm="full")
    assert (report.rows[0].block, report.rows[0].factors) == ("dense", "10x10")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.raw = nn.Parameter(torch.zeros(3, 2))
        self.bilinear = nn.Bilinear(2, 2, 2)
        self.fine = nn.Linear(2, 3)


def test_uncovered_parameters_and_why() -> None:
    report = kf.coverage(Tied())
    assert set(report.covered) == {"fine.weight", "fine.bias"}
    assert "tied" in report.uncovered["first.weight"]
    assert "second.weight" in report.uncovered["first.weight"]
    assert "Bilinear" in report.uncovered["bilinear.weight"]
    assert "Tied" in report.uncovered["raw"]
    assert all("plain gradient" in reason for reason in report.uncovered.values())
    entries = sum(parameter.numel() for parameter in Tied().parameters())
    assert report.fraction == pytest.approx(9 / entries)
    assert f"{9 / entries:.1%}" in str(report)


def test_a_model_without_any_block_is_reported_too() -> None:
    report = kf.coverage(nn.Bilinear(2, 2, 2))
    assert report.covered == ()
    assert report.memory == 0
    assert report.largest is None
    assert "covered: 0.0%" in str(report)
    assert repr(report) == "CoverageReport(0 of 2 parameters, 0 B)"


def test_the_old_networks_of_qe_are_counted() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    optimizer = kf.optim.KLDWRM(model, kf.Categorical(), variant="qe", rho=0.5, kl_clip=None)
    for _ in range(6):
        optimizer.step(lambda: model(torch.ones(5, 3)).logsumexp(1).mean())
    kept = [tensor for _, network in optimizer._networks.kept for tensor in network.values()]
    plain, report = kf.coverage(model), kf.coverage(model, snapshots=3)
    assert report.snapshot_memory == sum(tensor.numel() * tensor.element_size() for tensor in kept) == 3 * 26 * 4
    assert report.memory == plain.memory + report.snapshot_memory
    assert "+ snapshots 312 B = " in str(report)
    assert report.to_dict()["totals"]["snapshot_bytes"] == 312
    assert report.settings["snapshots"] == 3
    for bad in (-1, 1.5, True):
        with pytest.raises(ValueError, match=r"snapshots=.* must be an integer >= 0"):
            kf.coverage(model, snapshots=bad)  # type: ignore[arg-type]


def test_a_block_that_would_be_refused_says_so_and_takes_no_memory() -> None:
    report = kf.coverage(nn.Linear(784, 1000), approximation="dense")
    assert report.covered == ()
    assert "refused" in report.uncovered["weight"]


def test_nothing_is_allocated() -> None:
    # A terabyte of factors: on any other device than meta this would fail or take long.
    with torch.device("meta"):
        model = nn.Linear(400_000, 300_000)
    report = kf.coverage(model)
    assert report.factor_memory == (400_001**2 + 300_000**2) * 4
    assert report.largest == (400_001, "")
    assert "TiB" in str(report)


def test_text_is_a_table_with_notes_and_totals() -> None:
    model = ResNet()
    model.conv.weight.requires_grad_(False)
    text = str(kf.coverage(model))
    lines = text.splitlines()
    assert lines[0].split() == ["parameter", "layer", "shape", "block", "factors", "memory", "state"]
    assert len({line.index("Conv2d") for line in lines if "Conv2d" in line}) == 1, "columns are aligned"
    assert all(line == line.rstrip() for line in lines)
    assert "576x576 (x) 64x64" in text
    assert "largest factor: 576 wide" in text
    assert "432 more are frozen" in text
    assert max(map(len, lines[:60])) <= 120


def test_plain_data_and_table() -> None:
    report = kf.coverage(grouped())
    data = json.loads(json.dumps(report.to_dict()))
    assert len(data["rows"]) == len(report.rows)
    assert data["totals"]["memory_bytes"] == report.memory
    assert data["totals"]["largest_factor"] == {"width": 25, "layer": "4"}
    pytest.importorskip("pandas")
    table = report.table
    assert list(table["parameter"]) == [row.parameter for row in report.rows]
    assert table["factor_bytes"].sum() == report.factor_memory


def test_without_pandas_the_table_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pandas":
            raise ModuleNotFoundError("No module named 'pandas'", name="pandas")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModuleNotFoundError, match=r"kronfac\[experiments\]"):
        _ = kf.coverage(nn.Linear(2, 2)).table


class Middle(Statistic):
    def __init__(self, layer: LayerAdapter) -> None:
        super().__init__(layer)
        self.middle = Mean(zeros(layer, layer.d_out, layer.d_in))

    def means(self) -> dict[str, Mean]:
        return {"middle": self.middle}

    def add(self, sample: Any) -> None: ...

    def block(self) -> Block:
        raise AssertionError


class Own(Approximation):
    name = "own"

    def start(self, layer: LayerAdapter) -> Statistic:
        return Middle(layer)


def test_an_unknown_approximation_is_described_by_what_it_keeps() -> None:
    row = kf.coverage(nn.Linear(4, 3), approximation=Own()).rows[0]
    assert (row.block, row.factors, row.state) == ("middle", "middle 3x5", "approximate")
    assert row.factor_bytes == 15 * 4


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"approximation": "kfa"}, ValueError, "kfa"),
        ({"sharing": "both"}, ValueError, "both"),
        ({"norm": "none"}, ValueError, "norm"),
        ({"damping_rule": "pi"}, ValueError, "damping_rule='pi'"),
        ({"dtype": torch.float16}, ValueError, "float16"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        kf.coverage(nn.Linear(2, 2), **options)


def test_bad_models() -> None:
    with pytest.raises(TypeError, match="list"):
        kf.coverage([nn.Linear(2, 2)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no trainable parameter"):
        kf.coverage(nn.ReLU())
