"""The average of the iterates."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.optim.hand_kfac import network
from tests.optim.loops import batch, close, train
from tests.optim.unclipped import unclipped
from torch.nn import functional as F

import kronfac as kf


def test_the_average_is_a_plain_mean_and_then_exponential() -> None:
    model = network()
    optimizer = unclipped(model, kf.Categorical(), lr=0.1, average=0.75)
    wanted, iterates = torch.zeros(0), []
    for step in range(8):
        train(model, optimizer, 1, first=step)
        current = model[0].weight.detach().clone()
        iterates.append(current)
        wanted = torch.stack(iterates).mean(0) if step < 4 else 0.75 * wanted + 0.25 * current
        with optimizer.averaged():
            torch.testing.assert_close(model[0].weight.detach(), wanted)
        assert torch.equal(model[0].weight, current)


def test_the_iterate_comes_back_after_an_error() -> None:
    model = network()
    optimizer = unclipped(model, kf.Categorical(), lr=0.1, average=0.9)
    train(model, optimizer, 3)
    before = copy.deepcopy(model)

    def fail() -> None:
        with optimizer.averaged():
            assert not torch.equal(model[0].weight, before[0].weight)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    close(model, before, 0.0)


def test_a_late_first_gradient_does_not_pull_the_average_to_zero() -> None:
    model = network()
    optimizer = unclipped(model, kf.Categorical(), lr=1e-9, average=0.9)
    for step in range(4):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if step < 3:
            model[0].weight.grad = None
        optimizer.step()
    with optimizer.averaged():
        close(model, network(), 1e-6)


@pytest.mark.parametrize(
    ("average", "steps", "text"), [(None, 1, "made with average="), (0.9, 0, "needs at least one step")]
)
def test_averaged_without_an_average(average: float | None, steps: int, text: str) -> None:
    model = network()
    optimizer = unclipped(model, kf.Categorical(), lr=0.1, average=average)
    train(model, optimizer, steps)
    with pytest.raises(RuntimeError, match=text), optimizer.averaged():
        pass
