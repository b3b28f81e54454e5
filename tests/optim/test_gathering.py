"""When statistics are gathered, and when not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.exactness_helpers import draw
from tests.optim.gathering_helpers import LABELS, estimated, factors, hooks, make, same
from tests.optim.hand_kfac import network
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf


def test_every_micro_batch_of_a_step_is_gathered() -> None:
    """Of unequal sizes, weighted by them; the next step forgets once, not once for each."""
    model = network()
    optimizer = make(model, ema=0.5)
    x = draw(12, 3)
    for part in x.split([7, 3, 2]):
        F.cross_entropy(model(part), LABELS[: len(part)]).backward()
    same(factors(optimizer), estimated(model, (x, None)))
    first = estimated(model, (x, None))
    optimizer.step()
    later = draw(12, 3, seed=1)
    for part in later.split([4, 8]):
        model(part)
    second = estimated(model, (later, None))
    same(factors(optimizer), {name: (0.5 * first[name] + second[name]) / 1.5 for name in first})


@pytest.mark.parametrize("approximation", ["kfac", "diagonal", "dense"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_micro_batches_of_a_step_are_one_batch(reduction: str, approximation: str) -> None:
    """The curvature of an accumulated loss is that of the whole batch, through several forgetting steps too."""
    likelihood = kf.Categorical(reduction=reduction)
    options: dict[str, Any] = {"likelihood": likelihood, "approximation": approximation, "ema": 0.5, "kl_clip": None}
    models = network(), network()
    one, several = (make(model, **options) for model in models)
    for step in range(3):
        x, y = draw(8, 3, seed=step), LABELS
        one.zero_grad()
        likelihood.loss(models[0](x), y).backward()
        one.step()
        several.zero_grad()
        for part, labels in zip(x.split([4, 2, 2]), y.split([4, 2, 2]), strict=True):
            share = 1.0 if reduction == "sum" else len(part) / len(x)
            (share * likelihood.loss(models[1](part), labels)).backward()
        several.step()
        same(factors(several), factors(one))


def test_the_clip_counts_the_micro_batches_of_a_sum() -> None:
    """On equal examples a quarter of the last micro-batch says all about the sum over both."""
    model, likelihood = network(), kf.Categorical(reduction="sum")
    x, y = draw(1, 3).repeat(8, 1), torch.ones(8, dtype=torch.long)
    wanted = kf.reference.ggn(model, likelihood, x)
    optimizer = make(model, likelihood=likelihood, damping=0.1, kl_clip=1e-6, momentum=0.0)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    for part, labels in zip(x.split(4), y.split(4), strict=True):
        likelihood.loss(model(part), labels).backward()
    optimizer.step()
    move = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert float(move @ wanted @ move) == pytest.approx(1e-6, rel=1e-9)


@pytest.mark.parametrize("where", ["no_grad", "inference_mode", "eval", "paused"])
def test_forwards_that_gather_nothing(where: str) -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model)
    model(x)
    before = factors(optimizer)
    other = draw(8, 3, seed=1)
    if where == "no_grad":
        with torch.no_grad():
            model(other)
    elif where == "inference_mode":
        with torch.inference_mode():
            model(other)
    elif where == "eval":
        model.eval()(other)
        model.train()
    else:
        with optimizer.paused():
            model(other)
            with optimizer.paused():
                model(other)
            model(other)
    same(factors(optimizer), before, 0.0)
    model(other)
    assert optimizer._gatherer.gathered == 2


def test_pausing_ends_with_the_block_whatever_happens() -> None:
    optimizer = make(network())

    def fail() -> None:
        with optimizer.paused():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert optimizer._gatherer.enabled


def test_nothing_is_hooked_or_pulled_between_due_steps() -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model, stats_every=3, burn_in=0)
    gathered = []
    for _ in range(7):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), LABELS)
        gathered.append(optimizer._gatherer.gathered)
        assert hooks(model) == 2
        loss.backward()
        optimizer.step()
    assert gathered == [1, 0, 0, 1, 0, 0, 1]


def test_dropout_and_batch_norm_see_one_forward_only() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizer = make(models[0], source="sampled", kl_clip=1e-3)
    x, outputs = torch.randn(8, 3), []
    for model in models:
        torch.manual_seed(1)
        outputs.append(model(x))
        if model is models[0]:
            F.cross_entropy(outputs[0], LABELS).backward()
            optimizer.step()
        outputs.append(torch.rand(3))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    for name, buffer in models[1].named_buffers():
        assert torch.equal(models[0].get_buffer(name), buffer)


def measure_estimate(model: nn.Module, x: Tensor) -> None:
    kf.estimate(model, kf.Categorical(), (x, LABELS))


def measure_verify(model: nn.Module, x: Tensor) -> None:
    kf.verify(model, kf.Categorical(), (x, LABELS))


def measure_reference(model: nn.Module, x: Tensor) -> None:
    kf.reference.ggn(model, kf.Categorical(), x)


def measure_operators(model: nn.Module, x: Tensor) -> None:
    vector = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for operator in (kf.GaussNewtonOperator, kf.HessianOperator):
        operator(model, kf.Categorical(), [(x, LABELS)]).matmul(vector)


def measure_transform(model: nn.Module, x: Tensor) -> None:
    parameters = dict(model.named_parameters())
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)


@pytest.mark.parametrize(
    "measure", [measure_estimate, measure_verify, measure_reference, measure_operators, measure_transform]
)
def test_measurements_in_the_middle_of_training_are_no_training(measure: Any) -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model)
    model(x)
    before, random_state = factors(optimizer), optimizer._estimator.generator.get_state()
    measure(model, draw(8, 3, seed=1))
    same(factors(optimizer), before, 0.0)
    assert torch.equal(optimizer._estimator.generator.get_state(), random_state)
    model(x)
    assert optimizer._gatherer.gathered == optimizer._gatherer.forwards == 2
