"""Parameters without curvature, on the plain gradient or trained by a fallback."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.optim.hand_kfac import network
from tests.optim.loops import MAKERS, Mixed, batch, train
from tests.optim.unclipped import unclipped
from torch import nn
from torch.nn import functional as F

import kronfac as kf


def test_uncovered_parameters_take_the_plain_gradient_with_one_warning() -> None:
    model = Mixed()
    with pytest.warns(kf.CoverageWarning) as caught:
        optimizer = unclipped(model, kf.Categorical(), lr=0.1, momentum=0.0)
    (warning,) = caught
    for name in ("Trained without curvature", "bilinear.weight", "bilinear.bias", "scale"):
        assert name in str(warning.message)
    before = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1)
    for name in ("bilinear.weight", "bilinear.bias", "scale"):
        p, q = model.get_parameter(name), before.get_parameter(name)
        torch.testing.assert_close(p.detach(), q.detach() - 0.1 * p.grad)
    assert not torch.allclose(model.layer.weight, before.layer.weight - 0.1 * model.layer.weight.grad)


def fallback_pair(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], **options: Any
) -> tuple[Mixed, kf.optim.KFAC, Mixed, torch.optim.Optimizer]:
    """The optimiser with a fallback, and a twin whose uncovered parameters the same fallback trains alone."""
    model, twin = Mixed(), Mixed()
    with pytest.warns(kf.CoverageWarning, match="Trained by fallback"):
        optimizer = unclipped(model, kf.Categorical(), lr=0.1, fallback=make, **options)
    return model, optimizer, twin, make([*twin.bilinear.parameters(), twin.scale])


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_fallback_trains_what_has_no_curvature(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
    model, optimizer, twin, alone = fallback_pair(make, average=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    averages = []
    for step in range(4):
        x, y = batch(step)
        twin.layer.load_state_dict(model.layer.state_dict())
        twin.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        for group in alone.param_groups:
            group["lr"] = make([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] * 0.5**step
        alone.step()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        for name in ("bilinear.weight", "bilinear.bias", "scale"):
            torch.testing.assert_close(model.get_parameter(name), twin.get_parameter(name), rtol=1e-12, atol=1e-13)
        averages.append(model.scale.detach().clone())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    wanted = averages[0]
    for step, value in enumerate(averages[1:], 1):
        weight = max(0.5, 1 / (step + 1))
        wanted = (1 - weight) * wanted + weight * value
    with optimizer.averaged():
        torch.testing.assert_close(model.scale.detach(), wanted)


@pytest.mark.filterwarnings("ignore::kronfac.CoverageWarning")
def test_a_fallback_must_be_an_optimiser() -> None:
    with pytest.raises(TypeError, match=r"fallback must return a torch\.optim\.Optimizer, not list"):
        unclipped(Mixed(), kf.Categorical(), lr=0.1, fallback=lambda ps: ps)  # type: ignore[arg-type,return-value]
    assert unclipped(network(), kf.Categorical(), lr=0.1, fallback=MAKERS["adam"])._fallback is None
