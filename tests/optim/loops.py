"""Data, models, a training loop and a comparison of models, shared by the tests of the optimiser."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tests.exactness_helpers import double, draw
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf

STEPS = 6


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    y = torch.randint(3, (size,), generator=torch.Generator().manual_seed(step))
    return draw(size, 3, seed=100 + step), y


def train(model: nn.Module, optimizer: kf.optim.KFAC, steps: int = STEPS, first: int = 0) -> None:
    for step in range(first, first + steps):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def close(model: nn.Module, other: nn.Module, tolerance: float = 1e-9) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


class Mixed(nn.Module):
    """A linear layer, and parameters that no block covers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.bilinear, self.scale = nn.Linear(3, 4), nn.Bilinear(4, 4, 3), nn.Parameter(torch.ones(3))
        double(self)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x).tanh()
        return self.bilinear(hidden, hidden) * self.scale


MAKERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.3, momentum=0.5),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
}
