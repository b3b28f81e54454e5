"""TKFAC, from `kronfac.optim`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.optimizers.base import OptimizerSpec
from kronfac.experiments.optimizers.kfac import _OPTIONS as KFAC_OPTIONS
from kronfac.experiments.optimizers.options import Option, choice, flag, number, own_values
from kronfac.experiments.problems.base import Problem

_OWN = (
    Option(
        "source",
        "sampled",
        choice("sampled", "exact", "empirical", "root"),
        "which cotangents are pulled back; root: sampled, by random signs in place of labels",
    ),
    Option("scheme", "normal", choice("normal", "trace_restricted"), "how blocks are damped"),
    Option(
        "nu",
        1e-2,
        number(0.0, open_low=True),
        "least trace of a block with scheme=trace_restricted",
        idle=("scheme", ("normal",)),
    ),
    Option("printed_damping", False, flag, "with scheme=trace_restricted: (5.16) as it is printed", later=True),
)
_REPLACED = {"approximation", "damping_rule", "factor_damping", *(option.name for option in _OWN)}


def _tkfac(
    model: nn.Module, problem: Problem, values: Mapping[str, object], generator: torch.Generator
) -> torch.optim.Optimizer:
    from kronfac.optim import TKFAC

    try:
        return TKFAC(model, problem.likelihood(), generator=generator, **own_values(values))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ExperimentError(f"tkfac on {problem.name}: {error}") from error


FAMILY = (
    OptimizerSpec(
        name="tkfac",
        title="TKFAC",
        description="trace-restricted Kronecker-factored approximation (Gao et al. 2020)",
        options=(*(option for option in KFAC_OPTIONS if option.name not in _REPLACED), *_OWN),
        build=_tkfac,
    ),
)
