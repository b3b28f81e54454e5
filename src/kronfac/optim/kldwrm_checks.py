"""What KLD-WRM refuses, at construction and by name."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from kronfac.damping import Rule, exact
from kronfac.estimator import Estimator
from kronfac.likelihoods import Likelihood
from kronfac.optim.options import at_least, several_processes

_CHOICES = {
    "variant": ("so", "q", "qe"),
    "solve": ("stein", "reweighted", "iterative"),
    "kl_product": ("exact", "approximate"),
}


def check_choices(**given: str) -> None:
    """Refuse unknown words.

    Args:
        **given: Values of ``variant``, ``solve`` and ``kl_product``.

    Raises:
        ValueError: One is unknown.
    """
    for name, value in given.items():
        if value not in _CHOICES[name]:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {_CHOICES[name]}.")


def check_numbers(
    lam: float, rho: float, omega: float, n_inner: int, zeta: float, xi: float, rms_clip: float | None
) -> None:
    """Refuse numbers out of range.

    Args:
        lam: ``λ``.
        rho: ``ρ``.
        omega: ``ω``.
        n_inner: ``N_IS``.
        zeta: Factor of the exact divergences.
        xi: ``ξ``.
        rms_clip: ``τ``, or None.

    Raises:
        ValueError: One is out of range.
    """
    at_least("lam", lam, 0.0, open_=True)
    at_least("rho", rho, 0.0)
    if rho >= 1:
        raise ValueError(f"rho={rho!r} must be a number in [0, 1).")
    at_least("xi", xi, 0.0)
    if xi > 1:
        raise ValueError(f"xi={xi!r} must be a number in [0, 1].")
    for name, number in (("omega", omega), ("zeta", zeta), ("rms_clip", 1.0 if rms_clip is None else rms_clip)):
        at_least(name, number, 0.0, open_=True)
    at_least("n_inner", n_inner, 0, integer=True)


def check_cap(n_cap: int | None, rho: float, *, warn: bool) -> int:
    """Choose or check ``N_CAP``.

    Args:
        n_cap: The user's; None for the least with ``ρ^n_cap < 0.1``.
        rho: ``ρ``.
        warn: Whether to warn of a smaller one.

    Returns:
        ``N_CAP``.
    """
    if n_cap is None:
        return 1 if rho == 0 else math.floor(math.log(0.1) / math.log(rho)) + 1
    at_least("n_cap", n_cap, 1, integer=True)
    if warn and rho**n_cap >= 0.1:
        warnings.warn(f"rho**n_cap = {rho**n_cap:.2g} of the wake is dropped; raise n_cap or lower rho.", stacklevel=3)
    return n_cap


def check_blocks(estimator: Estimator, variant: str, solve: str, rule: Rule) -> None:
    """Refuse blocks that the algebra cannot do with.

    Args:
        estimator: Holds the layers' statistics.
        variant: The variant.
        solve: How sums are inverted.
        rule: The damping rule.

    Raises:
        ValueError: There is such a block, or several processes.
    """
    if several_processes():
        raise ValueError("KLDWRM does not run on several processes; kronfac.optim.KFAC does.")
    check_statistics(estimator, "approximation")
    approximation = estimator.approximation.name
    if variant == "so" or solve == "iterative" or approximation in ("dense", "diagonal"):
        return
    if rule is exact:
        raise ValueError(
            f"variant={variant!r} adds two curvatures, which damping_rule='exact' leaves without a solve for "
            f"approximation={approximation!r}; use damping_rule='factored' or solve='iterative'."
        )
    embedding = next((name for name, adapter in estimator.adaptation.adapters.items() if adapter.diagonal_input), None)
    if embedding is not None and solve == "stein":
        raise ValueError(
            f"solve='stein' has no solve for the embedding {embedding!r}, whose input factor is diagonal; use "
            "solve='reweighted' or 'iterative'."
        )


def check_statistics(estimator: Estimator, argument: str) -> None:
    """Refuse statistics that cannot be averaged, or started anew at each batch.

    Args:
        estimator: Holds them.
        argument: The argument that chose them.

    Raises:
        ValueError: They live in an eigenbasis, or couple layers.
    """
    name = estimator.approximation.name
    if estimator.joint is not None:
        raise ValueError(f"KLDWRM does not support {argument}={name!r}, which couples layers; use 'kfac'.")
    if any(statistic.keeps_basis for statistic in estimator.statistics.values()):
        raise ValueError(
            f"KLDWRM does not support {argument}={name!r}: its values live in an eigenbasis that is not averaged; use "
            "'kfac'."
        )


def check_model(variant: str, solve: str, stats_every: int) -> None:
    """Refuse a model of a structure of its own where there is no place for it.

    Args:
        variant: The variant.
        solve: How sums are inverted.
        stats_every: Period of the statistics.

    Raises:
        ValueError: There is none.
    """
    if variant == "so":
        raise ValueError("variant='so' has no quadratic model: model_approximation is for 'q' and 'qe'.")
    if solve != "iterative":
        raise ValueError(
            f"model_approximation adds two curvatures of different structure, for which solve={solve!r} has no inverse;"
            " set solve='iterative'."
        )
    if stats_every != 1:
        raise ValueError(
            f"model_approximation needs stats_every=1, not {stats_every!r}: between two gatherings B_k is the average "
            "of F (20), of its structure."
        )


def check_groups(groups: Sequence[Mapping[str, Any]]) -> float:
    """Refuse groups of which no single objective is made.

    Args:
        groups: Those of all parameters that move.

    Returns:
        Their one rate, ``1/λ``.

    Raises:
        ValueError: There is none, there are several, or a step is not all of the objective's.
    """
    if not groups:
        raise ValueError("variant='qe': the loss depends on no parameter that the optimiser has.")
    rates = {float(group["lr"]) for group in groups}
    if len(rates) > 1:
        raise ValueError(f"variant='qe' minimises one objective: all groups need the same lr = 1/λ, not {rates}.")
    if any(group["momentum"] or group["decoupled_weight_decay"] for group in groups):
        raise ValueError("variant='qe' takes no momentum and no decoupled weight decay.")
    return rates.pop()


def check_likelihood(
    likelihood: Likelihood, momentum: float, options: Mapping[str, Any], stats_every: int, xi: float
) -> None:
    """Refuse what QE-KLD-WRM has no place for.

    Args:
        likelihood: The loss.
        momentum: The optimiser's.
        options: The optimiser's further options.
        stats_every: Period of the statistics.
        xi: ``ξ``.

    Raises:
        ValueError: The likelihood gives no exact divergence, or an argument does not fit.
    """
    if isinstance(likelihood, Likelihood) and type(likelihood).symmetric_kl is Likelihood.symmetric_kl:
        raise ValueError(
            f"variant='qe' needs the exact symmetric KL divergence, which {type(likelihood).__name__} does not give: "
            "implement its symmetric_kl, or use variant='q'."
        )
    if isinstance(likelihood, Likelihood) and xi != 0.5 and type(likelihood).kl is Likelihood.kl:
        raise ValueError(f"xi={xi!r} needs the exact KL divergence, which {type(likelihood).__name__} does not give.")
    unfit = {"momentum": momentum, **{name: options.get(name) for name in ("decoupled_weight_decay", "fallback")}}
    if names := [name for name, value in unfit.items() if value]:
        raise ValueError(f"variant='qe' minimises one objective in all parameters and takes no {', '.join(names)}.")
    if isinstance(likelihood, Likelihood) and likelihood.needs_targets and stats_every != 1:
        raise ValueError(f"{likelihood!r} needs the targets at each step, captured by hand: set stats_every=1.")
