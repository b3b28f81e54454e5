"""``KFRA`` and ``KFLR``: Gauss-Newton with a recursive or exact output factor (Botev, Ritter & Barber 2017)."""

from __future__ import annotations

from typing import Any

from torch import nn

from kronfac.likelihoods import Likelihood
from kronfac.optim.adaptive import AdaptiveKFAC


class KFLR(AdaptiveKFAC):
    """Gauss-Newton steps with Kronecker factors of *low rank*: the exact source (Botev et al. 2017, appendix B).

    ``δ = α Δ`` with ``Δ = (G̃ + (γ + η)I)⁻¹ ∇f`` (33) and ``α`` from the full Gauss-Newton matrix of the mini-batch
    with ``τ + η`` on its diagonal (39–41); ``τ`` follows the reduction ratio every 5 steps (42, with thresholds ¾ and
    ¼), ``γ`` is the best of its neighbours every 20 steps, and the iterates are averaged with ``β_t = min(0.95, 1 −
    1/t)`` (44, 45), see :meth:`averaged`.  No momentum: this is :class:`kronfac.optim.AdaptiveKFAC` with other
    defaults, where ``τ`` is called ``λ`` and ``η`` is ``weight_decay``.

    Args:
        model: The module that the closure calls.
        likelihood: The loss.
        **options: As for :class:`kronfac.optim.AdaptiveKFAC`.
    """

    SOURCE = "exact"

    def __init__(self, model: nn.Module, likelihood: Likelihood, **options: Any) -> None:
        defaults = {"source": self.SOURCE, "momentum": False, "average": 0.95, "fraction": 1.0}
        super().__init__(model, likelihood, **{**defaults, **options})


class KFRA(KFLR):
    """Gauss-Newton steps with a *recursive* output factor: averages are propagated instead of examples.

    As :class:`KFLR`, with ``source="recursive"``: for sequential nets of linear and convolutional layers, elementwise
    activations and pooling.

    Args:
        model: The module that the closure calls.
        likelihood: The loss.
        **options: As for :class:`kronfac.optim.AdaptiveKFAC`.
    """

    SOURCE = "recursive"
