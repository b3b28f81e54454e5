"""Differential equations, solved by networks."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from kronfac.experiments.models import ASKED, PoissonResidual, TaylorPerceptron
from kronfac.experiments.problems.base import Data, Problem
from kronfac.experiments.problems.losses import gaussian, half_squared_error, real_squared_errors

_INSIDE, _BORDER, _TEST = 900, 120, 1000


def _solution(points: Tensor) -> Tensor:
    return torch.sin(math.pi * points).prod(1, keepdim=True)


def _rows(points: Tensor, asked: str) -> Tensor:
    return torch.cat([points, torch.full((len(points), 1), ASKED[asked])], dim=1)


def _square() -> Data:
    """Draw points of the unit square, the same in every run; tests ask for the solution itself."""
    generator = torch.Generator().manual_seed(0)
    inside, test = torch.rand(_INSIDE, 2, generator=generator), torch.rand(_TEST, 2, generator=generator)
    border = torch.rand(_BORDER, 2, generator=generator)
    border[torch.arange(_BORDER), torch.arange(_BORDER) % 2] = (torch.arange(_BORDER) // 2 % 2).float()
    rows = torch.cat([_rows(inside, "equation"), _rows(border, "border")])
    targets = torch.cat([2 * math.pi**2 * _solution(inside), torch.zeros(_BORDER, 1)])
    return Data(rows, targets, _rows(test, "solution"), _solution(test))


def _network(widths: tuple[int, ...]) -> nn.Module:
    return PoissonResidual(TaylorPerceptron(widths))


FAMILY = (
    Problem(
        name="poisson",
        description="A physics-informed network, 2-64-64-48-1: -Δu = 2π² sin πx sin πy in the square, zero around it",
        dataset=None,
        build=partial(_network, (2, 64, 64, 48, 1)),
        prepare=_square,
        likelihood=gaussian,
        loss=half_squared_error,
        measures={"squared_error": real_squared_errors},
        batch_size=_INSIDE + _BORDER,
        steps=500,
        evaluate_every=10,
        tuned={"sgd": {"lr": 0.00136}, "adam": {"lr": 0.00504}, "kfac": {"lr": 0.0568, "damping": 0.00447}},
        tuned_over=(
            "by the training loss after 500 steps with seed 0, twelve trials each of kronfac sweep: lr of SGD, Adam; "
            "lr, damping of KFAC"
        ),
    ),
)
