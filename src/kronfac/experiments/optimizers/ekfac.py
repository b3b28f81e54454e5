"""EKFAC, from `kronfac.optim`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.optimizers import kfac
from kronfac.experiments.optimizers.base import OptimizerSpec
from kronfac.experiments.optimizers.options import choice, own_values
from kronfac.experiments.problems.base import Problem

#: Exact damping wants a larger number than factored damping, whose cross terms add to it.
_OWN = {
    "lr": {"default": 0.03},
    "damping": {"default": 0.1},
    "source": {"parse": choice("sampled", "exact", "empirical", "root")},
}
#: KFAC's, but for what EKFAC decides itself.
_OPTIONS = tuple(
    replace(option, **_OWN.get(option.name, {}))  # type: ignore[arg-type]
    for option in kfac.FAMILY[0].options
    if option.name not in ("approximation", "damping_rule", "factor_damping", "inverse", "asynchronous", "drift")
)


def _ekfac(
    model: nn.Module, problem: Problem, values: Mapping[str, object], generator: torch.Generator
) -> torch.optim.Optimizer:
    from kronfac.optim import EKFAC

    try:
        return EKFAC(model, problem.likelihood(), generator=generator, **own_values(values))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ExperimentError(f"ekfac on {problem.name}: {error}") from error


FAMILY = (
    OptimizerSpec(
        name="ekfac",
        title="EKFAC",
        description="second moments re-estimated in the Kronecker eigenbasis (George et al. 2018)",
        options=_OPTIONS,
        build=_ekfac,
    ),
)
