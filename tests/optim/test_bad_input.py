"""Bad options stop at construction, bad numbers stop the step; parameters stay as they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw
from tests.optim.hand_kfac import network
from tests.optim.unclipped import unclipped
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf

LABELS = torch.arange(8) % 3
CATEGORICAL = kf.Categorical()


def unchanged(model: nn.Module, before: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


# ---------------------------------------------------------------------------------------------------- construction
OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "negative rate": ({"lr": -0.1}, ValueError, r"lr=-0\.1 must be a number >= 0"),
    "rate nan": ({"lr": float("nan")}, ValueError, "lr=nan"),
    "rate text": ({"lr": "fast"}, ValueError, "lr='fast'"),
    "rate tensor": ({"lr": torch.tensor(0.1)}, ValueError, "lr as a tensor"),
    "negative damping": ({"damping": -1e-3}, ValueError, r"damping=-0\.001"),
    "infinite damping": ({"damping": float("inf")}, ValueError, "damping=inf"),
    "negative momentum": ({"momentum": -0.1}, ValueError, "momentum=-0.1"),
    "momentum one": ({"momentum": 1.0}, ValueError, r"momentum=1\.0 must be less than 1"),
    "negative decay": ({"weight_decay": -1.0}, ValueError, "weight_decay=-1"),
    "clip zero": ({"kl_clip": 0.0}, ValueError, r"kl_clip=0\.0 must be a number > 0"),
    "clip text": ({"kl_clip": "some"}, ValueError, "kl_clip='some' must be a number > 0, 'auto' or None"),
    "period zero": ({"stats_every": 0}, ValueError, "stats_every=0 must be an integer >= 1"),
    "period fraction": ({"invert_every": 2.5}, ValueError, r"invert_every=2\.5"),
    "period bool": ({"stats_every": True}, ValueError, "stats_every=True"),
    "ema one": ({"ema": 1.0}, ValueError, r"ema=1\.0"),
    "ema negative": ({"ema": -0.5}, ValueError, r"ema=-0\.5"),
    "average two": ({"average": 2.0}, ValueError, r"average=2\.0"),
    "burn-in": ({"burn_in": -1}, ValueError, "burn_in=-1"),
    "no examples": ({"stats_examples": 0}, ValueError, "stats_examples=0 must be an integer >= 1"),
    "part of an example": ({"stats_examples": 0.5}, ValueError, r"stats_examples=0\.5 must be an integer >= 1"),
    "examples bool": ({"stats_examples": True}, ValueError, "stats_examples=True"),
    "rule": ({"damping_rule": "magic"}, ValueError, "'magic'"),
    "approximation": ({"approximation": "magic"}, ValueError, "approximation='magic'"),
    "source": ({"source": "magic"}, ValueError, "source='magic'"),
    "sharing": ({"sharing": "magic"}, ValueError, "sharing='magic'"),
    "norm": ({"norm": "magic"}, ValueError, "norm='magic'"),
    "unknown option": ({"dampening": 0.1}, TypeError, r"unknown options \['dampening'\]; known are"),
    "mismatch": ({"approximation": "dense", "source": "forward_only"}, ValueError, "needs paired statistics"),
    "strangers": (
        {"param_groups": [{"params": [nn.Parameter(torch.zeros(2))]}]},
        ValueError,
        "1 tensors that are no parameters",
    ),
    "group": ({"param_groups": [{"params": [], "damping": -1.0}]}, ValueError, r"damping=-1\.0"),
    "generator": ({"generator": 3}, TypeError, "generator must be a torch.Generator, not int"),
}


@pytest.mark.parametrize(("options", "error", "text"), OPTIONS.values(), ids=OPTIONS)
def test_options_are_checked_at_construction(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        unclipped(network(), CATEGORICAL, **{"lr": 0.1, **options})


def test_models_and_likelihoods_are_checked_at_construction() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, .*not generator: give KFAC the model"):
        unclipped(network().parameters(), CATEGORICAL, lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"not CrossEntropyLoss; kronfac\.likelihood_of"):
        unclipped(network(), nn.CrossEntropyLoss(), lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no trainable parameter"):
        unclipped(network().requires_grad_(False), CATEGORICAL, lr=0.1)
    with pytest.raises(ValueError, match=r"No layer of the model has a curvature block: weight, bias .*Bilinear"):
        unclipped(nn.Bilinear(2, 2, 2), CATEGORICAL, lr=0.1)


def test_defaults_are_those_of_the_contract() -> None:
    optimizer = kf.optim.KFAC(network(), CATEGORICAL, 0.1)
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in ("lr", "momentum", "damping", "weight_decay", "kl_clip")} == {
        "lr": 0.1,
        "momentum": 0.9,
        "damping": 1e-3,
        "weight_decay": 0.0,
        "kl_clip": "auto",
    }
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert "KFAC" in repr(optimizer)


# ---------------------------------------------------------------------------------------------------- forward
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_stop_the_forward_with_the_layers_name(value: float) -> None:
    model = network()
    optimizer = unclipped(model, CATEGORICAL, lr=0.1)
    x = draw(8, 3)
    model(x)
    kept = {n: s.means()["input"].value() for n, s in optimizer._estimator.statistics.items()}
    before = copy.deepcopy(model)
    bad = x.clone()
    bad[0, 0] = value
    with pytest.raises(FloatingPointError, match=r"layer,? '0'[\s\S]*no parameter was changed"):
        model(bad)
    assert unchanged(model, before)
    for name, statistic in optimizer._estimator.statistics.items():
        assert torch.equal(statistic.means()["input"].value(), kept[name])
    F.cross_entropy(model(x), LABELS).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_parameters_that_are_not_finite_name_the_layer() -> None:
    model = network()
    optimizer = unclipped(model, CATEGORICAL, lr=0.1)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"layer '[02]'"):
        model(draw(8, 3))
    assert optimizer._steps == 0


@pytest.mark.parametrize(
    ("likelihood", "error"), [(kf.Categorical(), "Bernoulli for single logits"), (kf.Gaussian(), None)]
)
def test_likelihoods_that_do_not_fit_the_outputs(likelihood: kf.Likelihood, error: str | None) -> None:
    model = double(nn.Linear(3, 1))
    optimizer = unclipped(model, likelihood, lr=0.1)
    if error is None:
        model(draw(8, 3))
        return
    with pytest.raises(ValueError, match=error):
        model(draw(8, 3))
    assert optimizer._gatherer.gathered == 0


# ---------------------------------------------------------------------------------------------------- step
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["0.bias", "4.weight"])
def test_gradients_that_are_not_finite_stop_the_step(where: str, value: float) -> None:
    model, x = network(), draw(8, 3)
    optimizer = unclipped(model, CATEGORICAL, lr=0.1, average=0.9)
    F.cross_entropy(model(x), LABELS).backward()
    model.get_parameter(where).grad.view(-1)[0] = value
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(FloatingPointError, match=rf"gradient of {where}; no parameter was changed"):
        optimizer.step()
    assert unchanged(model, before)
    assert optimizer.state_dict()["kronfac"]["steps"] == state["kronfac"]["steps"]
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("damping", [1e4, 1e-6])
def test_large_finite_gradients(damping: float) -> None:
    """Their norm overflows in float32, they do not; what they become may."""
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    optimizer = unclipped(model, CATEGORICAL, lr=1e-30, damping=damping)
    F.cross_entropy(model(torch.randn(8, 3)), LABELS).backward()
    model.weight.grad.fill_(1e38)
    before = copy.deepcopy(model)
    if damping > 1:
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())
        return
    with pytest.raises(FloatingPointError, match=r"the preconditioned gradient of weight.*raise damping"):
        optimizer.step()
    assert unchanged(model, before)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3))
        double(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


@pytest.mark.filterwarnings("ignore::kronfac.CoverageWarning")
def test_gradients_of_the_fallback_are_looked_at_too() -> None:
    model = Mixed()
    optimizer = unclipped(model, CATEGORICAL, lr=0.1, fallback=lambda ps: torch.optim.SGD(ps, lr=0.1))
    F.cross_entropy(model(draw(8, 3)), LABELS).backward()
    model.scale.grad[0] = torch.nan
    before = copy.deepcopy(model)
    with pytest.raises(FloatingPointError, match="gradient of scale"):
        optimizer.step()
    assert unchanged(model, before)


@pytest.mark.parametrize("rule", ["factored", "exact"])
@pytest.mark.parametrize("approximation", ["kfac", "dense", "diagonal"])
def test_singular_curvature_without_damping_names_the_layer(rule: str, approximation: str) -> None:
    model = network()
    optimizer = unclipped(
        model, CATEGORICAL, lr=0.1, damping=0.0, damping_rule=rule, approximation=approximation, source="exact"
    )
    x = torch.zeros(8, 3, dtype=torch.float64)  # the first layer sees nothing but its bias
    F.cross_entropy(model(x), LABELS).backward()
    before = copy.deepcopy(model)
    with pytest.raises(torch.linalg.LinAlgError, match=r"layer '0'|'0'"):
        optimizer.step()
    assert unchanged(model, before)


def test_statistics_that_overflow_name_the_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = unclipped(model, CATEGORICAL, lr=0.1)
    F.cross_entropy(model(torch.full((8, 3), 1e25)), LABELS).backward()
    before = copy.deepcopy(model)
    with pytest.raises(FloatingPointError, match="input factor of layer '0' overflowed"):
        optimizer.step()
    assert unchanged(model, before)


def test_a_clip_without_a_forward_says_what_it_needs() -> None:
    model, x = network(), draw(8, 3)
    optimizer = unclipped(model, CATEGORICAL, lr=0.1, kl_clip=1e-3)
    with optimizer.capture() as capture:
        value = x
        for layer in model:
            value = layer(value)
        capture(value)
    F.cross_entropy(value, LABELS).backward()
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"kl_clip .* needs the arguments of the root module's forward"):
        optimizer.step()
    assert unchanged(model, before)


def test_uncommon_but_right_uses_are_no_error() -> None:
    model, x = network(), draw(8, 3)
    optimizer = unclipped(model, CATEGORICAL, lr=0.0, damping=1)
    before = copy.deepcopy(model)
    F.cross_entropy(model(x), LABELS).backward()
    optimizer.step()
    assert unchanged(model, before)
    optimizer.zero_grad(set_to_none=False)
    model(x)
    optimizer.step()  # zero gradients
    optimizer.zero_grad()
    model(x)
    optimizer.step()  # no gradients
    assert unchanged(model, before)


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_factor_that_overflowed_is_named_at_the_refresh(side: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1)
    F.cross_entropy(model(torch.ones(5, 3)), torch.arange(5) % 2).backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer._estimator.statistics["2"].means()[side].total[1, 1] = torch.inf
    with pytest.raises(FloatingPointError, match=f"The {side} factor of layer '2' overflowed"):
        optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_parameters_in_place_of_the_model_are_told_apart() -> None:
    with pytest.raises(TypeError, match=r"not generator: give KFAC the model in place of model\.parameters\(\)"):
        kf.optim.KFAC(network().parameters(), CATEGORICAL, lr=0.1)  # type: ignore[arg-type]
