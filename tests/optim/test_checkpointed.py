"""Checkpoints, which repeat a part of the forward in each backward, those of the optimiser's own too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.exactness_helpers import draw
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kronfac as kf

INPUTS = draw(40, 6)
LABELS = torch.arange(40) % 3


class Network(nn.Module):
    """A residual branch of which only the input is kept.

    Args:
        norm: What normalises its input.
        repeats: Whether it is computed once more in the backward.
    """

    def __init__(self, norm: type[nn.Module], repeats: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.branch, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm, self.dropout, self.repeats = norm(8), nn.Dropout(0.2), repeats
        self.double()

    def _branch(self, h: Tensor) -> Tensor:
        return h + self.dropout(self.branch(self.norm(h)).tanh())

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(checkpoint(self._branch, h, use_reentrant=False) if self.repeats else self._branch(h))


MAKE: dict[str, Callable[..., Any]] = {
    "KFAC": lambda m, **o: kf.optim.KFAC(m, kf.Categorical(), lr=0.1, **o),
    "EKFAC": lambda m, **o: kf.optim.EKFAC(m, kf.Categorical(), lr=0.1, **o),
    "AdaptiveKFAC": lambda m, **o: kf.optim.AdaptiveKFAC(m, kf.Categorical(), damping=1.0, **o),
    "HessianFree": lambda m, **o: kf.optim.HessianFree(m, kf.Categorical(), damping=1.0, max_iterations=3, **o),
    "KLDWRM": lambda m, **o: kf.optim.KLDWRM(m, kf.Categorical(), lam=1.0, variant="qe", solve="reweighted", **o),
}


def train(model: Network, make: Callable[..., Any], **options: Any) -> None:
    optimizer = make(model, **options)
    torch.manual_seed(1)
    for _ in range(3):
        if isinstance(optimizer, (kf.optim.AdaptiveKFAC, kf.optim.KLDWRM)):
            optimizer.step(lambda: F.cross_entropy(model(INPUTS), LABELS))
        else:
            optimizer.zero_grad()
            F.cross_entropy(model(INPUTS), LABELS).backward()
            optimizer.step()


@pytest.mark.parametrize("stats_forward", ["shared", "own"])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_running_statistics_move_as_those_of_any_optimiser(make: Callable[..., Any], stats_forward: str) -> None:
    model = Network(nn.BatchNorm1d, repeats=True)
    train(model, make, stats_forward=stats_forward)
    assert model.norm.num_batches_tracked == 3 * 2  # once in each forward, and once in its backward


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_steps_are_those_without(make: Callable[..., Any]) -> None:
    found = []
    for repeats in (False, True):
        model = Network(nn.LayerNorm, repeats)
        train(model, make)
        found.append(nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
