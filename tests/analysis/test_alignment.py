"""Alignment with exact Gauss-Newton updates, against dense solves with the oracle's matrix."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw, positions
from torch import Tensor, nn

import kronfac as kf
from kronfac.analysis import Alignment, ConvergenceWarning, Method, alignment, alignment_during_training
from kronfac.layers import adapt_model

DAMPING = 0.05


def perceptron() -> nn.Module:
    return double(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))


def convolutional() -> nn.Module:
    front = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh()
    return double(nn.Sequential(*front, nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(18, 3)))


def labels(count: int, classes: int = 3) -> Tensor:
    return torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(7))


def data_for(model: nn.Module, count: int = 12) -> tuple[Tensor, Tensor]:
    shape = (2, 4, 4) if isinstance(model[0], nn.Conv2d) else (5,)  # type: ignore[index]
    return draw(count, *shape, seed=1), labels(count)


def brute_force(
    model: nn.Module, likelihood: kf.Likelihood, data: tuple[Tensor, Tensor]
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Places of the layers, the gradient, and the exact updates: block by block, and full."""
    model = copy.deepcopy(model).eval()
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(likelihood.loss(model(data[0]), data[1]), parameters)
    g = torch.cat([part.flatten() for part in gradient])
    matrix = kf.reference.ggn(model, likelihood, *data)
    damped = matrix + DAMPING * torch.eye(len(g), dtype=g.dtype)
    places = {name: positions(model, a).flatten() for name, a in adapt_model(model).adapters.items()}
    blocks = torch.zeros_like(g)
    for place in places.values():
        blocks[place] = -torch.linalg.solve(damped[place][:, place], g[place])
    return places, g, blocks, -torch.linalg.solve(damped, g)


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def by_key(rows: list[Alignment]) -> dict[tuple[str, str, str], Alignment]:
    return {(row.method, row.layer, row.reference): row for row in rows}


@pytest.mark.parametrize("build", [perceptron, convolutional])
@pytest.mark.parametrize("precondition", [True, False])
def test_every_cosine_agrees_with_dense_solves(build: Any, precondition: bool) -> None:
    model, likelihood = build(), kf.Categorical()
    data = data_for(model)
    halves = [(data[0][:7], data[1][:7]), (data[0][7:], data[1][7:])]
    methods = ["kfac:exact", "diagonal:exact", "kfac:exact:factored"]
    rows = by_key(
        alignment(
            model, likelihood, halves, methods, damping=DAMPING, tolerance=1e-12, precondition=precondition, norm="full"
        )
    )
    places, g, blocks, full = brute_force(model, likelihood, data)
    updates = {"gradient": -g, "block-diagonal": blocks}
    for name in methods:
        approximation, source, *rule = name.split(":")
        curvature = kf.estimate(model.eval(), likelihood, data, approximation=approximation, source=source, norm="full")
        inverse = curvature.factorise(DAMPING, rule[0] if rule else "exact")
        start, vector = 0, {}
        for key, parameter in model.named_parameters():
            vector[key] = g[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
        found = inverse.apply(vector)
        updates[name] = -torch.cat([found[key].flatten() for key, _ in model.named_parameters()])
    places["all layers"] = torch.arange(len(g))
    seen = 0
    for method, update in updates.items():
        for reference, exact in (("block-diagonal", blocks), ("full", full)):
            if method == reference:
                continue
            for layer, place in places.items():
                row = rows[method, layer, reference]
                assert row.cosine == pytest.approx(cosine(update[place], exact[place]), abs=1e-8)
                assert row.norm_ratio == pytest.approx(float(update[place].norm() / exact[place].norm()), rel=1e-8)
                assert row.converged
                assert 0 < row.residual <= 1e-12
                assert row.iterations > 0
                seen += 1
    assert seen == len(rows)


def test_dense_blocks_are_the_block_diagonal_update() -> None:
    model = perceptron()
    rows = alignment(model, kf.Categorical(), data_for(model), ["dense:exact"], damping=DAMPING)
    found = [row for row in rows if row.method == "dense:exact" and row.reference == "block-diagonal"]
    assert len(found) == 4
    for row in found:
        assert row.cosine == pytest.approx(1.0, abs=1e-8)
        assert row.norm_ratio == pytest.approx(1.0, abs=1e-6)


def test_for_a_single_layer_the_blocks_are_the_whole() -> None:
    model = double(nn.Sequential(nn.Linear(5, 3)))
    rows = by_key(alignment(model, kf.Categorical(), data_for(model), ["dense:exact"], damping=DAMPING))
    assert rows["dense:exact", "0", "full"].cosine == pytest.approx(1.0, abs=1e-8)
    assert rows["block-diagonal", "0", "full"].cosine == pytest.approx(1.0, abs=1e-8)
    assert rows["gradient", "0", "full"].cosine < 0.999


def test_weight_sharing_over_positions() -> None:
    model = double(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    x, y = draw(6, 7, 4, seed=3), torch.randint(0, 3, (6, 7), generator=torch.Generator().manual_seed(1))
    likelihood = kf.Categorical()
    rows = by_key(alignment(model, likelihood, (x, y), ["dense:exact"], damping=DAMPING, tolerance=1e-12))
    places, g, blocks, full = brute_force(model, likelihood, (x, y))
    assert rows["block-diagonal", "all layers", "full"].cosine == pytest.approx(cosine(blocks, full), abs=1e-8)
    assert rows["dense:exact", "0", "block-diagonal"].cosine == pytest.approx(1.0, abs=1e-8)
    assert rows["gradient", "2", "full"].cosine == pytest.approx(cosine(-g[places["2"]], full[places["2"]]), abs=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_s_reduction_counts(reduction: str) -> None:
    model, likelihood = perceptron(), kf.Bernoulli(reduction=reduction)
    x = draw(10, 5, seed=1)
    y = draw(10, 3, seed=2).sigmoid()
    rows = by_key(alignment(model, likelihood, [(x[:4], y[:4]), (x[4:], y[4:])], [], damping=DAMPING, tolerance=1e-12))
    _, g, blocks, full = brute_force(model, likelihood, (x, y))
    assert rows["gradient", "all layers", "full"].cosine == pytest.approx(cosine(-g, full), abs=1e-8)
    assert rows["gradient", "all layers", "full"].norm_ratio == pytest.approx(float(g.norm() / full.norm()), rel=1e-8)
    assert rows["gradient", "all layers", "block-diagonal"].cosine == pytest.approx(cosine(-g, blocks), abs=1e-8)


def test_the_model_is_left_alone() -> None:
    model = convolutional().train()
    model[2].eval()  # type: ignore[index]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    alignment(model, kf.Categorical(), data_for(model), damping=DAMPING, full=False)
    assert [m.training for m in model] == [True, True, False, True, True, True]  # type: ignore[union-attr]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_copy_in_double_precision() -> None:
    model = perceptron()
    data = data_for(model)
    wanted = alignment(copy.deepcopy(model).float().double(), kf.Categorical(), data, damping=DAMPING)
    single = copy.deepcopy(model).float()
    found = alignment(single, kf.Categorical(), (data[0], data[1]), damping=DAMPING, dtype=torch.float64)
    assert [row.cosine for row in found] == pytest.approx([row.cosine for row in wanted], abs=1e-10)
    assert next(single.parameters()).dtype == torch.float32


def test_what_did_not_converge_is_flagged() -> None:
    model = perceptron()
    with pytest.warns(ConvergenceWarning, match=r"did not reach 1e-08 in 2 iterations for the .*full update of 0"):
        rows = alignment(
            model, kf.Categorical(), data_for(model), [], damping=1e-6, max_iterations=2, precondition=False
        )
    full = [row for row in rows if row.reference == "full"]
    assert full
    assert not any(row.converged for row in full)
    assert all(row.residual > 1e-8 for row in full)


def test_parameters_without_curvature_stay_fixed() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(5))
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.scale * x)

    model = double(Scaled())
    x, y = draw(9, 5, seed=1), labels(9)
    with pytest.warns(kf.CoverageWarning, match="held fixed, since no curvature covers them: scale"):
        rows = by_key(alignment(model, kf.Categorical(), (x, y), ["dense:exact"], damping=DAMPING))
    assert rows["dense:exact", "all layers", "full"].cosine == pytest.approx(1.0, abs=1e-8)


def test_along_a_training() -> None:
    model = perceptron()
    data = data_for(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)

    def advance() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()

    twin = copy.deepcopy(model)
    rows = alignment_during_training(
        model, kf.Categorical(), data, advance, steps=5, every=2, damping=DAMPING, methods=["kfac:exact"]
    )
    assert list(dict.fromkeys(row.step for row in rows)) == [0, 2, 4, 5]
    first = alignment(twin, kf.Categorical(), data, ["kfac:exact"], damping=DAMPING)
    last = alignment(model, kf.Categorical(), data, ["kfac:exact"], damping=DAMPING)
    assert [row.cosine for row in rows if row.step == 0] == [row.cosine for row in first]
    assert [row.cosine for row in rows if row.step == 5] == [row.cosine for row in last]
    assert [row.cosine for row in first] != [row.cosine for row in last]


@pytest.mark.parametrize("name", sorted(kf.approximations.APPROXIMATIONS))
def test_every_registered_approximation_is_measured_or_refused_by_name(name: str) -> None:
    model = perceptron()

    def measure(method: str) -> list[Alignment]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return alignment(model, kf.Categorical(), data_for(model), [method], damping=DAMPING, full=False)

    measured = 0
    for source in sorted(kf.sources.SOURCES):
        method = f"{name}:{source}"
        try:
            try:
                rows = measure(method)
            except TypeError as error:  # no inverse with exact damping: its message names the rule that has one
                assert "rule='factored'" in str(error)  # noqa: PT017
                method += ":factored"
                rows = measure(method)
        except (ValueError, NotImplementedError) as error:
            assert source in str(error) or name in str(error)  # noqa: PT017
            continue
        found = next(row for row in rows if row.method == method and row.layer == "all layers")
        assert -1.0 <= found.cosine <= 1.0 + 1e-12
        measured += 1
    assert measured, "no source fits"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kfac:nope", "source='nope' is unknown"),
        ("nope", "approximation='nope' is unknown"),
        ("kfac:exact:nope", "unknown damping rule 'nope'"),
        ("kfac::exact", "such as kfac:exact, got 'kfac::exact'"),
        ("a:b:c:d", "a method is approximation:source"),
    ],
)
def test_bad_methods_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Method.parse(text)


def test_names_of_methods() -> None:
    assert Method.parse("kfac").name == "kfac:sampled"
    assert Method.parse("kfac:exact:factored").name == "kfac:exact:factored"
    assert Method(kf.approximations.KFAC(), kf.sources.Exact(), "exact").name == "kfac:exact"


def test_bad_arguments_are_named() -> None:
    model = perceptron()
    data = data_for(model)
    with pytest.raises(ValueError, match="damping must be positive"):
        alignment(model, kf.Categorical(), data, damping=0.0)
    with pytest.raises(TypeError, match=r"likelihood must be a kronfac\.Likelihood"):
        alignment(model, nn.CrossEntropyLoss(), data)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        alignment(None, kf.Categorical(), data)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="data is empty"):
        alignment(model, kf.Categorical(), [])
    with pytest.raises(ValueError, match="dtype must be"):
        alignment(model, kf.Categorical(), data, dtype=torch.float16)
    with pytest.raises(TypeError, match="a method is a text"):
        alignment(model, kf.Categorical(), data, [3])  # type: ignore[list-item]
    for options, message in (({"steps": -1}, "steps must be"), ({"steps": 1, "every": 0}, "every must be")):
        with pytest.raises(ValueError, match=message):
            alignment_during_training(model, kf.Categorical(), data, lambda: None, **options)
