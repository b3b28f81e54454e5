"""KL clip: ``vᵀFv ≤ C`` with an exact curvature product on a sub-batch (Grosse & Martens 2016, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from kronfac import processes
from kronfac.forwards import pick_outputs
from kronfac.likelihoods import Likelihood
from kronfac.operators import ggn_quadratic_form
from kronfac.optim.gathering import Gatherer
from kronfac.optim.last_batch import LastBatch, last_batch
from kronfac.optim.options import inner_product

#: Part of the mini-batch used for the exact product, as in the paper.
FRACTION = 4

#: Bound of ``kl_clip="auto"``: nats per term of the loss (a label, a pixel) and step.
AUTO = 0.01


def bound_of(kl_clip: float | str, terms: float) -> float:
    """Bound on ``vᵀFv`` in the loss's own units.

    Args:
        kl_clip: A number, or ``"auto"``.
        terms: Number of terms of the loss for each unit of its denominator: 1 for a mean over all terms, the number of
            pixels for a loss summed over them.

    Returns:
        ``C``.
    """
    return AUTO * terms if isinstance(kl_clip, str) else kl_clip


class KLClip:
    """Scale for an update ``v`` such that ``vᵀFv`` stays below a bound.

    The approximate curvature gives ``vᵀF̂v`` for free.  The exact product is formed when asked for, and the ratio of
    the two, which changes slowly, corrects the free value in between.

    Attributes:
        ratio: Last measured ``vᵀFv / vᵀF̂v``, or None.
        last: Last value of ``vᵀFv`` before clipping.
        scale: Last factor applied.
    """

    def __init__(self) -> None:
        self.ratio: float | None = None
        self.last = 0.0
        self.scale = 1.0

    def __call__(
        self, bound: float, approximate: float, exact: Callable[[], float] | None, multiple: float = 1.0
    ) -> float:
        """Return the factor for an update.

        Args:
            bound: ``C``.
            approximate: ``vᵀF̂v``. Where it is zero nothing is measured, and the last ratio stays.
            exact: Forms ``vᵀFv``; None to use the last ratio.
            multiple: What both are yet to be multiplied by: the squared rate, which may be zero for a while.

        Returns:
            ``min(1, √(C / vᵀFv))``.

        Raises:
            FloatingPointError: The product is not finite.
        """
        if exact is not None and approximate > 0:
            value = exact()
            if not math.isfinite(value):
                raise FloatingPointError(
                    "The curvature product vᵀFv of the KL clip is NaN or Inf; no parameter was changed."
                )
            self.ratio = value / approximate
        elif exact is None and self.ratio is None:
            self.ratio = 1.0
        self.last = (1.0 if self.ratio is None else self.ratio) * approximate * multiple
        self.scale = math.sqrt(bound / self.last) if self.last > bound else 1.0
        return self.scale


def exact_product(
    gatherer: Gatherer, likelihood: Likelihood, vector: Mapping[str, Tensor], pick: Callable[[Any], Tensor] | None
) -> float:
    """``vᵀFv`` on a quarter of the mini-batch that the last forward saw, of two examples at least.

    Examples are taken to lie along the first dimension of inputs and outputs; where that does not hold, or the model
    does not take a part of them, it is the whole mini-batch (:mod:`kronfac.optim.last_batch`).

    Args:
        gatherer: Holds that forward's arguments.
        likelihood: The loss.
        vector: ``v`` by parameter name.
        pick: Picks the output tensor.

    Returns:
        The value.
    """

    def product(batch: LastBatch) -> Tensor:
        def outputs(found: Any) -> Tensor:
            picked = pick_outputs(found, pick)
            if batch.examples is not None and len(picked) != batch.examples:
                raise ValueError(f"{batch.examples} examples gave {len(picked)} outputs.")
            return picked

        with gatherer.paused(), torch.autocast(next(iter(vector.values())).device.type, enabled=False):
            return ggn_quadratic_form(gatherer.root, likelihood, batch.inputs, vector, batch.targets, outputs=outputs)

    what, value = "kl_clip (None switches it off)", None
    batch = last_batch(gatherer, what, 1 / FRACTION)
    if batch.examples is not None:
        # Where the model does not take a part; what is wrong otherwise shows on the whole batch.
        with suppress(IndexError, RuntimeError, TypeError, ValueError):
            value = product(batch)
    if value is None:
        batch = batch if batch.examples is None else last_batch(gatherer, what)
        value = product(batch)
    # A sum over a part of the last of a step's batches is as much smaller; means are not.
    whole = max(gatherer.gathered, 1) * batch.whole if likelihood.reduction == "sum" else 1.0
    local = float(value) * whole
    # All processes of a distributed run must clip alike.
    return processes.mean_of(local, value.device)


def clip_scale(
    clip: KLClip,
    gatherer: Gatherer,
    members: Sequence[tuple[str, Tensor, Mapping[str, Any]]],
    gradients: Mapping[str, Tensor],
    directions: Mapping[str, Tensor],
    rates: Mapping[str, float],
    due: bool,
    pick: Callable[[Any], Tensor] | None,
) -> float:
    """Factor for the update ``v = -rate · direction`` of all parameters together.

    Args:
        clip: Remembers the last measured ratio.
        gatherer: Watches the model.
        members: Name, parameter and group of each parameter that moves.
        gradients: Gradients by name, an L2 term included.
        directions: Preconditioned gradients by name.
        rates: What each direction is multiplied by, without its sign.
        due: Whether the exact product is to be formed.
        pick: Picks the output tensor.

    Returns:
        The factor, at most 1; where groups differ in ``kl_clip``, a ``ValueError`` says so.
    """
    given = _bound(members)
    # "auto" does not insist where the outputs were captured by hand
    if given is None or (isinstance(given, str) and due and gatherer.last is None):
        return 1.0
    estimator = gatherer.estimator
    terms = estimator.terms
    if isinstance(given, str):
        terms = processes.mean_of(terms, members[0][1].device)  # all processes must clip alike
    # One rate for all, as there mostly is, comes out of the forms, and the directions need no copy.
    several = len(set(rates.values())) > 1
    products = torch.stack([inner_product(gradients[n], directions[n]) for n in rates]).double()
    if several:
        products = products * products.new_tensor([rate * rate for rate in rates.values()])

    def exact() -> float:
        dense = {n: directions[n].to_dense() if directions[n].is_sparse else directions[n] for n in rates}
        vector = {n: dense[n] * rate for n, rate in rates.items()} if several else dense
        decay = sum(
            group["weight_decay"] * float(inner_product(vector[n], vector[n]))
            for n, _, group in members
            if not group["decoupled_weight_decay"] and group["weight_decay"]
        )
        return decay + exact_product(gatherer, estimator.likelihood, vector, pick)

    rate = 1.0 if several else next(iter(rates.values()))
    return clip(bound_of(given, terms), float(products.sum()), exact if due else None, rate * rate)


def _bound(members: Sequence[tuple[str, Tensor, Mapping[str, Any]]]) -> float | str | None:
    """The one bound of all that moves, since it is one on the step as a whole."""
    bounds = list(dict.fromkeys(group["kl_clip"] for _, _, group in members))
    if len(bounds) > 1:
        raise ValueError(
            f"kl_clip bounds the step of all parameters together, but parameter groups have {bounds}: give all of them "
            "the same."
        )
    return bounds[0] if bounds else None
