"""The objective that AdaptiveKFAC minimises, at the present parameters; a step that blew it up is taken back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kronfac.optim.closure import Closure
from kronfac.optim.kfac import KFAC
from kronfac.optim.levenberg_marquardt import LevenbergMarquardt
from kronfac.optim.options import check_finite

#: Steps that are checked one by one at the start and after a rejection.
PROBATION = 5
#: A loss that grows by this factor over a step that was not checked is looked at again without that step.
SUSPICIOUS = 1.5


class Objective(KFAC):
    """Loss, penalty and gradient; the part of AdaptiveKFAC that has no curvature.

    Its attributes are set by the class that takes steps.
    """

    _lam: LevenbergMarquardt
    _decay: float
    _probation: int
    _unchecked: float | None

    def _gradient(self, call: Closure, params: list[Tensor]) -> tuple[float, list[Tensor]]:
        """Evaluate loss and gradient; take the step before back if they are not finite, or if it blew the loss up."""
        previous = [self.state[p].get("previous") for p in params]
        known = self._steps > 0 and all(v is not None for v in previous)
        try:
            found = self._finite_gradient(call, params)
            if not known or self._unchecked is None or found[0] <= SUSPICIOUS * abs(self._unchecked):
                return found
        except FloatingPointError:
            if not known:
                raise
            found = math.inf, []
        torch._foreach_sub_(params, previous)
        if found[1] and call.value() >= found[0]:
            torch._foreach_add_(params, previous)  # a hard mini-batch, not a bad step
            return found
        try:
            found = self._finite_gradient(call, params)
        except FloatingPointError:
            torch._foreach_add_(params, previous)  # the data are to blame, not the step
            raise
        for parameter in params:
            del self.state[parameter]["previous"]
        self._probation, self._lam.streak = PROBATION, 0
        self._lam.scale(4.0**4)
        return found

    def _finite_gradient(self, call: Closure, params: list[Tensor]) -> tuple[float, list[Tensor]]:
        self._gatherer.reset()
        loss, gradients = call.gradient()
        if not math.isfinite(loss):
            raise FloatingPointError(f"The loss is {loss}; no parameter was changed. Look at the inputs and targets.")
        check_finite({self._names[id(p)]: g for p, g in zip(params, gradients, strict=True)})
        return loss, gradients

    def _check_forwards(self) -> None:
        seen = max(self._gatherer.forwards, self._gatherer.gathered)
        if seen != 1:
            raise RuntimeError(
                f"The closure called the model {seen} times in train mode with gradients; {type(self).__name__} needs "
                "one forward of the whole mini-batch, of whose outputs the loss is a function."
            )
        self._check_statistics()

    def _penalty(self, params: list[Tensor]) -> float:
        if not self._decay:
            return 0.0
        norms = torch.stack([norm.double() for norm in torch._foreach_norm(params)])
        return 0.5 * self._decay * float(norms.square().sum())

    def _objective(self, call: Closure, params: list[Tensor]) -> float:
        try:
            value = call.value() + self._penalty(params)
        except FloatingPointError:
            return math.inf
        return value if math.isfinite(value) else math.inf
