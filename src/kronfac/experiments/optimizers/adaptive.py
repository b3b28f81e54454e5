"""The optimisers that tune themselves, from `kronfac.optim`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.optimizers.base import Builder, OptimizerSpec
from kronfac.experiments.optimizers.kfac import STATS_EXAMPLES, STATS_FORWARD
from kronfac.experiments.optimizers.options import (
    Option,
    choice,
    flag,
    integer,
    number,
    number_or,
    optional,
    own_values,
)
from kronfac.experiments.problems.base import Problem


def _fraction(default: object) -> Option:
    parse = number_or("auto", number(0.0, 1.0, open_low=True))
    return Option("fraction", default, parse, "part of the batch for exact curvature products; auto: a quarter")


_SHARED = (
    Option(
        "damping", "auto", number_or("auto", number(0.0, open_low=True)), "initial λ; auto: tried on the first batch"
    ),
    Option("weight_decay", 0.0, number(0.0), "strength of the decay of weights, part of the objective"),
    Option(
        "approximation",
        "kfac",
        choice("kfac", "tkfac", "ekfac", "sua", "prong", "xkfac", "xkfac_trace", "diagonal", "dense"),
        "what of the curvature is kept",
    ),
    Option("damping_rule", "factored", choice("factored", "exact"), "how the damping is split over the factors"),
    Option("stats_every", 1, integer(1), "steps between statistics passes"),
    STATS_EXAMPLES,
    STATS_FORWARD,
    Option("invert_every", 20, integer(1), "steps between inversions"),
    Option("ema", 0.95, number(0.0, 1.0, open_high=True), "decay of the running factors"),
)
_ADAPTIVE = (
    *_SHARED,
    Option("adapt_every", 5, integer(1), "steps between adaptations of λ"),
    Option("greedy_every", 20, optional(integer(1)), "steps between choices of γ; none: it stays the first"),
)
_HESSIAN_FREE = (
    *_SHARED,
    _fraction(1.0),
    Option("max_iterations", 50, integer(1), "conjugate gradients end after so many iterations"),
    Option("precondition", True, flag, "whether Kronecker factors precondition conjugate gradients"),
    Option("block_diagonal", False, flag, "whether each layer is solved for by itself"),
)


def _builder(kind: str) -> Builder:
    def build(
        model: nn.Module, problem: Problem, values: Mapping[str, object], generator: torch.Generator
    ) -> torch.optim.Optimizer:
        from kronfac import optim

        if values["schedule"] != "constant":
            raise ExperimentError(f"{kind} chooses its own step size: schedule must be constant")
        try:
            optimizer: torch.optim.Optimizer = getattr(optim, kind)(
                model, problem.likelihood(), generator=generator, average=None, **own_values(values)
            )
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ExperimentError(f"{kind} on {problem.name}: {error}") from error
        return optimizer

    return build


FAMILY = (
    OptimizerSpec(
        name="adaptive_kfac",
        title="K-FAC, adaptive",
        description="K-FAC that chooses step size, momentum and damping itself (Martens and Grosse 2015)",
        options=(
            *_ADAPTIVE,
            _fraction("auto"),
            Option("momentum", True, flag, "whether the last step is one of the directions"),
            Option(
                "source",
                "sampled",
                choice("sampled", "exact", "empirical", "recursive", "root"),
                "which cotangents are pulled back; root: sampled, by random signs in place of labels",
            ),
        ),
        build=_builder("AdaptiveKFAC"),
        closure=True,
    ),
    OptimizerSpec(
        name="kflr",
        title="KFLR",
        description="Gauss-Newton with exact output factors (Botev et al. 2017)",
        options=(*_ADAPTIVE, _fraction(1.0)),
        build=_builder("KFLR"),
        closure=True,
    ),
    OptimizerSpec(
        name="kfra",
        title="KFRA",
        description="Gauss-Newton with recursive output factors (Botev et al. 2017)",
        options=(*_ADAPTIVE, _fraction(1.0)),
        build=_builder("KFRA"),
        closure=True,
    ),
    OptimizerSpec(
        name="hessian_free",
        title="Hessian-free",
        description="Gauss-Newton by conjugate gradients with exact products (Martens 2010)",
        options=_HESSIAN_FREE,
        build=_builder("HessianFree"),
        closure=True,
    ),
)
