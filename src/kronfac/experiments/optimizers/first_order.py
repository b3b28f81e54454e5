"""Optimisers of the first order, from `torch.optim`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from kronfac.experiments.optimizers.base import OptimizerSpec
from kronfac.experiments.optimizers.options import Option, flag, number
from kronfac.experiments.problems.base import Problem

_LR = number(0.0, open_low=True)
_DECAY = number(0.0, 1.0, open_high=True)
_WEIGHT_DECAY = Option("weight_decay", 0.0, number(0.0), "strength of the decay of weights")
_MOMENTS = (
    Option("beta1", 0.9, _DECAY, "decay of the mean gradient"),
    Option("beta2", 0.999, _DECAY, "decay of the mean squared gradient"),
    Option("eps", 1e-8, number(0.0), "added to the root of the mean squared gradient"),
)


def _sgd(
    model: nn.Module, problem: Problem, values: Mapping[str, object], generator: torch.Generator
) -> torch.optim.Optimizer:
    own = {name: values[name] for name in ("lr", "momentum", "weight_decay")}
    nesterov = bool(values["nesterov"]) and values["momentum"] != 0.0
    return torch.optim.SGD(model.parameters(), nesterov=nesterov, **own)  # type: ignore[arg-type]


def _adam(
    model: nn.Module, problem: Problem, values: Mapping[str, object], generator: torch.Generator
) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), **_moments(values))  # type: ignore[arg-type]


def _adamw(
    model: nn.Module, problem: Problem, values: Mapping[str, object], generator: torch.Generator
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **_moments(values))  # type: ignore[arg-type]


def _moments(values: Mapping[str, object]) -> dict[str, object]:
    own = {name: values[name] for name in ("lr", "eps", "weight_decay")}
    return {**own, "betas": (values["beta1"], values["beta2"])}


FAMILY = (
    OptimizerSpec(
        name="sgd",
        title="SGD-momentum",
        description="stochastic gradient descent with Nesterov momentum",
        options=(
            Option("lr", 0.01, _LR, "learning rate"),
            Option("momentum", 0.9, _DECAY, "momentum"),
            Option("nesterov", True, flag, "Nesterov's form of it"),
            _WEIGHT_DECAY,
        ),
        build=_sgd,
    ),
    OptimizerSpec(
        name="adam",
        title="Adam",
        description="Adam",
        options=(Option("lr", 1e-3, _LR, "learning rate"), *_MOMENTS, _WEIGHT_DECAY),
        build=_adam,
    ),
    OptimizerSpec(
        name="adamw",
        title="AdamW",
        description="Adam with decoupled weight decay",
        options=(
            Option("lr", 1e-3, _LR, "learning rate"),
            *_MOMENTS,
            Option("weight_decay", 0.01, number(0.0), "strength of the decoupled decay of weights"),
        ),
        build=_adamw,
    ),
)
