"""SOAP, from `pytorch_optimizer`, which is imported when a run needs it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from kronfac.experiments.errors import need
from kronfac.experiments.optimizers.base import OptimizerSpec
from kronfac.experiments.optimizers.options import Option, integer, number, optional
from kronfac.experiments.problems.base import Problem

_LIBRARY, _EXTRA = "pytorch_optimizer", "rivals"
_DECAY = number(0.0, 1.0, open_high=True)


def _soap(
    model: nn.Module, problem: Problem, values: Mapping[str, object], generator: torch.Generator
) -> torch.optim.Optimizer:
    own = {name: values[name] for name in ("lr", "eps", "weight_decay", "shampoo_beta")}
    return need(_LIBRARY, _EXTRA).SOAP(
        model.parameters(),
        betas=(values["beta1"], values["beta2"]),
        precondition_frequency=values["refresh_every"],
        max_precondition_dim=values["max_width"],
        **own,
    )


FAMILY = (
    OptimizerSpec(
        name="soap",
        title="SOAP",
        description="Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024)",
        options=(
            Option("lr", 3e-3, number(0.0, open_low=True), "learning rate"),
            Option("beta1", 0.95, _DECAY, "decay of the mean gradient"),
            Option("beta2", 0.95, _DECAY, "decay of the mean squared gradient"),
            Option("shampoo_beta", None, optional(_DECAY), "decay of the preconditioner; none: beta2"),
            Option("eps", 1e-8, number(0.0), "added to the root of the mean squared gradient"),
            Option("weight_decay", 0.01, number(0.0), "strength of the decoupled decay of weights"),
            Option("refresh_every", 10, integer(1), "steps between updates of the eigenbases"),
            Option("max_width", 10000, integer(1), "greatest dimension that gets an eigenbasis"),
        ),
        build=_soap,
        library=(_LIBRARY, _EXTRA),
    ),
)
