"""Steps of AdaptiveKFAC that blew the loss up: what is left of them, and of the evaluation that found it out."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tests.exactness_helpers import draw
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf

LABELS = torch.arange(24) % 3
INPUTS = draw(24, 4)


class Network(nn.Module):
    """Batch norm and dropout, whose masks are noted."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.double()
        self.dropout = dropout
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = F.dropout(x.new_ones(len(x), 8), self.dropout, self.training)
        self.masks.append(mask)
        return self.last(self.norm(self.first(x)).relu() * mask)


def trained(dropout: float = 0.5, **options: Any) -> tuple[Network, kf.optim.AdaptiveKFAC]:
    """A network after some steps, the last of which was not checked."""
    model = Network(dropout)
    optimizer = kf.optim.AdaptiveKFAC(model, kf.Categorical(), damping=0.3, **options)
    torch.manual_seed(1)
    while optimizer._unchecked is None:
        optimizer.step(lambda: F.cross_entropy(model(INPUTS), LABELS))
    return model, optimizer


def move_last_step(model: nn.Module, optimizer: kf.optim.AdaptiveKFAC, size: float) -> None:
    """Make the last step as much longer in a random direction, as if it had been such a one."""
    for index, parameter in enumerate(model.parameters()):
        kick = size * draw(*parameter.shape, seed=index)
        with torch.no_grad():
            parameter.add_(kick)
            optimizer.state[parameter]["previous"].add_(kick)


def step(model: Network, optimizer: kf.optim.AdaptiveKFAC) -> float:
    model.masks.clear()
    torch.manual_seed(2)
    return float(optimizer.step(lambda: F.cross_entropy(model(INPUTS), LABELS)))


@pytest.mark.parametrize("options", [{}, {"stats_forward": "own"}, {"stats_examples": 20}], ids=str)
def test_nothing_is_left_of_a_step_that_was_taken_back(options: dict[str, Any]) -> None:
    model, optimizer = trained(**options)
    other, twin = trained(**options)
    move_last_step(model, optimizer, 1e3)
    with torch.no_grad():
        for parameter in other.parameters():  # by hand
            parameter.sub_(twin.state[parameter].pop("previous"))
    assert step(model, optimizer) == pytest.approx(step(other, twin), rel=1e-9)
    wanted, tracked = twin.curvature().blocks, other.norm.num_batches_tracked
    for name, block in optimizer.curvature().blocks.items():
        torch.testing.assert_close(block.to_dense(), wanted[name].to_dense(), rtol=1e-8, atol=1e-10)
    assert torch.equal(model.norm.num_batches_tracked, tracked)
    torch.testing.assert_close(model.norm.running_var, other.norm.running_var, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("found", [math.inf, math.nan])
@pytest.mark.parametrize("checked", [False, True])
def test_statistics_of_a_loss_that_is_not_finite_are_dropped(found: float, checked: bool) -> None:
    """Outputs and inputs of layers are finite yet, but so large that their squares would stay in the averages."""
    model, optimizer = trained()
    if checked:
        optimizer._unchecked = None
    before = optimizer.curvature().trace()
    move_last_step(model, optimizer, 1e30)

    def loss() -> Tensor:
        value = F.cross_entropy(model(INPUTS), LABELS)
        return value + found if value > 1e6 else value

    optimizer.step(loss)
    assert optimizer.curvature().trace() < 10 * before


def test_all_evaluations_of_a_step_that_takes_one_back_have_the_same_masks() -> None:
    model, optimizer = trained()
    move_last_step(model, optimizer, 1e3)
    step(model, optimizer)
    assert len(model.masks) > 3
    assert all(torch.equal(mask, model.masks[0]) for mask in model.masks)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    F.dropout(torch.ones(24, 8, dtype=torch.float64), 0.5)
    assert torch.equal(state, torch.get_rng_state()), "the random state moved on once"


def test_a_hard_batch_keeps_the_step_and_is_counted_once() -> None:
    model, optimizer = trained(dropout=0.0)
    before, lam, tracked = copy.deepcopy(model), optimizer._lam.value, int(model.norm.num_batches_tracked)
    optimizer._unchecked = 1e-3  # as if the last batch had been an easy one
    loss = step(model, optimizer)
    assert loss == float(F.cross_entropy(before(INPUTS), LABELS).detach()), "it was not taken back"
    assert optimizer._lam.value < 2 * lam
    assert int(model.norm.num_batches_tracked) == tracked + 1


class Spare(nn.Module):
    """A layer that the forward does not call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.spare = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


@pytest.mark.parametrize("kind", ["AdaptiveKFAC", "KFLR", "HessianFree", "KLDWRM"])
def test_layers_that_no_forward_calls_stand_still(kind: str) -> None:
    model = Spare()
    options: dict[str, Any] = {"variant": "qe", "lam": 10.0} if kind == "KLDWRM" else {}
    optimizer = getattr(kf.optim, kind)(model, kf.Categorical(), **options)
    before = model.spare.weight.detach().clone()
    losses = [float(optimizer.step(lambda: F.cross_entropy(model(INPUTS), LABELS))) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert torch.equal(model.spare.weight, before)
