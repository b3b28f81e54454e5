"""A step that could be taken: its directions, and what the quadratic model says about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kronfac.blocks import Inverse
from kronfac.likelihoods import Likelihood
from kronfac.operators import ggn_gram
from kronfac.operators.passes import same_random_state
from kronfac.optim.gathering import Gatherer
from kronfac.optim.last_batch import LastBatch
from kronfac.optim.quadratic import QuadraticModel, inner_products


@dataclass(frozen=True, eq=False)
class Proposal:
    """Directions of a step.

    Attributes:
        gamma: Damping of the approximate curvature.
        inverses: The damped inverses, by layer.
        directions: ``Δ``, and the last step where momentum is used; each a list over the parameters.
        model: The quadratic model along them.
    """

    gamma: float
    inverses: dict[str, Inverse]
    directions: list[list[Tensor]]
    model: QuadraticModel

    @property
    def along(self) -> float:
        """Exact curvature along ``Δ``, ``ΔᵀFΔ / ΔᵀΔ``."""
        return float(self.model.curvature[0, 0] / self.model.squares[0, 0].clamp_min(1e-300))

    def step(self, coefficients: Tensor) -> list[Tensor]:
        """``Σ cᵢ vᵢ``.

        Args:
            coefficients: ``c``, one for each direction.

        Returns:
            New tensors, one for each parameter.
        """
        total = list(torch._foreach_mul(self.directions[0], float(coefficients[0])))
        for coefficient, direction in zip(coefficients[1:], self.directions[1:], strict=True):
            torch._foreach_add_(total, direction, alpha=float(coefficient))
        return total


def quadratic_model(
    gatherer: Gatherer,
    likelihood: Likelihood,
    names: Sequence[str],
    gradients: Sequence[Tensor],
    directions: Sequence[Sequence[Tensor]],
    batch: LastBatch,
    pick: Callable[[Any], Tensor] | None,
) -> QuadraticModel:
    """Form the quadratic model of a mini-batch along some directions, with exact curvature.

    Args:
        gatherer: Watched the forward.
        likelihood: The loss.
        names: Names of the parameters.
        gradients: ``∇h``, one tensor for each parameter.
        directions: Vectors, each a list over the parameters.
        batch: What the products are formed on.
        pick: Picks the output tensor.

    Returns:
        The model.

    Raises:
        FloatingPointError: The curvature along a direction is not finite.
    """
    vectors: list[Mapping[str, Tensor]] = [dict(zip(names, v, strict=True)) for v in directions]
    with (
        gatherer.paused(),
        same_random_state(gatherer.root, gatherer.last_random),
        torch.autocast(gradients[0].device.type, enabled=False),
    ):
        gram = ggn_gram(gatherer.root, likelihood, batch.inputs, vectors, batch.targets, outputs=pick)
    curvature = gram.double() * (batch.whole if likelihood.reduction == "sum" else 1.0)
    if not bool(curvature.isfinite().all()):
        raise FloatingPointError("The curvature along the step is NaN or Inf; no parameter was changed.")
    slopes = inner_products(directions, [gradients])[:, 0]
    return QuadraticModel(slopes, curvature, inner_products(directions, directions), torch.finfo(gram.dtype).eps)
