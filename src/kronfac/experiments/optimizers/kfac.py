"""KFAC, from `kronfac.optim`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.optimizers.base import OptimizerSpec
from kronfac.experiments.optimizers.options import (
    WARM_UP,
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

#: Wherever the damping rule is one of the options.
FACTOR_DAMPING = Option(
    "factor_damping",
    None,
    optional(number(0.0, open_low=True)),
    "added to each Kronecker factor's eigenvalues in place of damping and decay (Puiu 2022); none: the rule's",
)

#: Wherever statistics are of mini-batches.
STATS_EXAMPLES = Option(
    "stats_examples",
    None,
    optional(integer(1)),
    "first examples of a batch that statistics are of; none: all",
    later=True,
)

STATS_FORWARD = Option(
    "stats_forward",
    "shared",
    choice("shared", "own"),
    "own: one more forward for statistics, with less memory for wide maps",
    later=True,
)

_OPTIONS = (
    Option("lr", 0.1, number(0.0, open_low=True), "learning rate"),
    Option("momentum", 0.9, number(0.0, 1.0, open_high=True), "momentum"),
    Option("damping", 1e-3, number(0.0), "what is added to the curvature before it is inverted"),
    Option("weight_decay", 0.0, number(0.0), "strength of the decay of weights"),
    Option("decoupled_weight_decay", False, flag, "whether the decay bypasses the curvature"),
    Option(
        "approximation",
        "kfac",
        choice("kfac", "tkfac", "tekfac", "sua", "prong", "xkfac", "xkfac_trace", "diagonal", "dense"),
        "what of the curvature is kept",
    ),
    Option(
        "source",
        "sampled",
        choice("sampled", "exact", "empirical", "forward_only", "recursive", "root"),
        "which cotangents are pulled back; root: sampled, by random signs in place of labels",
    ),
    Option("damping_rule", "factored", choice("factored", "exact"), "how the damping is split over the factors"),
    FACTOR_DAMPING,
    Option("stats_every", 10, integer(1), "steps between statistics passes"),
    Option("invert_every", 100, integer(1), "steps between inversions"),
    STATS_EXAMPLES,
    STATS_FORWARD,
    Option(
        "inverse", "cholesky", choice("cholesky", "newton_schulz"), "how Kronecker factors are inverted", later=True
    ),
    Option(
        "products",
        "float32",
        choice("float32", "bfloat16"),
        "precision of products with the inverses of wide layers",
        later=True,
    ),
    Option(
        "gradients",
        "dense",
        choice("dense", "rows"),
        "rows: linear layers wider than the batch form their direction alone; needs kl_clip=none",
        later=True,
    ),
    Option(
        "asynchronous",
        0,
        integer(0),
        "steps until inverses that are due take effect, computed by a thread meanwhile; 0: at once",
        later=True,
    ),
    Option(
        "drift",
        None,
        optional(number(0.0, open_low=True)),
        "mean relative change of a factor's eigenvalues that asks for new inverses; none: when due alone",
        later=True,
    ),
    WARM_UP,
    Option("burn_in", 10, integer(0), "first steps that all gather statistics"),
    Option("ema", 0.95, number(0.0, 1.0, open_high=True), "decay of the running factors"),
    Option(
        "kl_clip",
        "auto",
        optional(number_or("auto", number(0.0, open_low=True))),
        "bound on the step's change of the outputs; auto: 0.01 nats per term of the loss; none: no clip",
    ),
)


def with_rule(values: dict[str, Any]) -> dict[str, Any]:
    """Let ``factor_damping`` take the place of the damping rule.

    Args:
        values: Hyper-parameters.

    Returns:
        Arguments of the optimiser.
    """
    from kronfac.damping import EachFactor

    each = values.pop("factor_damping")
    return values if each is None else {**values, "damping_rule": EachFactor(each)}


def _kfac(
    model: nn.Module, problem: Problem, values: Mapping[str, object], generator: torch.Generator
) -> torch.optim.Optimizer:
    from kronfac.optim import KFAC

    own = with_rule(own_values(values))
    try:
        return KFAC(model, problem.likelihood(), generator=generator, **own)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ExperimentError(f"kfac on {problem.name}: {error}") from error


FAMILY = (
    OptimizerSpec(
        name="kfac",
        title="KFAC",
        description="Kronecker-factored approximate curvature (Martens and Grosse 2015; Grosse and Martens 2016)",
        options=_OPTIONS,
        build=_kfac,
    ),
)
