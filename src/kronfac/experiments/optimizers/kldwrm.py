"""KLD-WRM, from `kronfac.optim`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.optimizers.base import Builder, OptimizerSpec
from kronfac.experiments.optimizers.kfac import FACTOR_DAMPING, with_rule
from kronfac.experiments.optimizers.kfac import FAMILY as KFAC_FAMILY
from kronfac.experiments.optimizers.options import Option, choice, integer, number, optional, own_values
from kronfac.experiments.problems.base import Problem

#: KFAC's that mean the same here; the others are below.
_KEPT = {"damping", "weight_decay", "source", "stats_every", "stats_examples", "stats_forward", "burn_in", "kl_clip"}
_SHARED = (
    Option("lr", 0.01, number(0.0, open_low=True), "1/λ, the strength of the wake inverted"),
    Option("rho", 0.5, number(0.0, 1.0, open_high=True), "decay of the wake and of the running factors"),
    *(option for option in KFAC_FAMILY[0].options if option.name in _KEPT),
    FACTOR_DAMPING,
    Option("rms_clip", None, optional(number(0.0, open_low=True)), "bound on a layer's step by root mean square"),
    Option(
        "kl_product",
        "exact",
        choice("exact", "approximate"),
        "what kl_clip bounds: curvature products, or the inner product of step and gradient",
        later=True,
    ),
)
_MOMENTUM = Option("momentum", 0.0, number(0.0, 1.0, open_high=True), "momentum of the steps")
_RULE = next(option for option in KFAC_FAMILY[0].options if option.name == "damping_rule")
_BLOCKS = choice("kfac", "diagonal", "dense", "tkfac", "sua", "prong")
_APPROXIMATION = Option("approximation", "kfac", _BLOCKS, "what of the curvature is kept")
_MODEL = (
    _RULE,
    _APPROXIMATION,
    Option(
        "solve",
        "stein",
        choice("stein", "reweighted", "iterative"),
        "how the sum of two Kronecker products is inverted",
    ),
    Option(
        "model_approximation",
        None,
        optional(_BLOCKS),
        "what is kept of the model's curvature; none: as the wake's; needs solve=iterative and stats_every=1",
        later=True,
    ),
)
_EXACT = (
    Option("omega", 0.07, number(0.0, open_low=True), "learning rate within a step, times λ"),
    Option("n_inner", 10, integer(0), "iterations within a step"),
    Option("n_cap", None, optional(integer(1)), "networks that a step looks at; none: the least with ρ^n < 0.1"),
    Option("zeta", 1 / 330, number(0.0, open_low=True), "factor of the exact divergences"),
    Option("xi", 0.5, number(0.0, 1.0), "weight of the divergences from the old networks; 0.5: symmetric"),
)


def _builder(variant: str) -> Builder:
    def build(
        model: nn.Module, problem: Problem, values: Mapping[str, object], generator: torch.Generator
    ) -> torch.optim.Optimizer:
        from kronfac.optim import KLDWRM

        own = with_rule(own_values(values))
        lam = 1.0 / own.pop("lr")
        try:
            return KLDWRM(model, problem.likelihood(), lam, variant=variant, generator=generator, **own)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ExperimentError(f"kldwrm_{variant} on {problem.name}: {error}") from error

    return build


FAMILY = (
    OptimizerSpec(
        name="kldwrm_so",
        title="SO-KLD-WRM",
        description="natural gradient with a first-order wake of divergences (Puiu 2022)",
        options=(*_SHARED, _MOMENTUM, _RULE, _APPROXIMATION),
        build=_builder("so"),
    ),
    OptimizerSpec(
        name="kldwrm_q",
        title="Q-KLD-WRM",
        description="quadratic model with a wake of quadratic divergences (Puiu 2022)",
        options=(*_SHARED, _MOMENTUM, *_MODEL),
        build=_builder("q"),
    ),
    OptimizerSpec(
        name="kldwrm_qe",
        title="QE-KLD-WRM",
        description="quadratic model with a wake of exact divergences (Puiu 2022)",
        options=(*_SHARED, *_MODEL, *_EXACT),
        build=_builder("qe"),
        closure=True,
    ),
)
