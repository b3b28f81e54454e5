"""The objective that AdaptiveKFAC minimises, at the present parameters; steps that blew it up or raised are undone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kronfac.measuring import remembered_buffers
from kronfac.optim.closure import Closure
from kronfac.optim.kfac import KFAC
from kronfac.optim.levenberg_marquardt import LevenbergMarquardt
from kronfac.optim.options import check_finite

#: Steps that are checked one by one at the start and after a rejection.
PROBATION = 5
#: A loss that grows by this factor over a step that was not checked is looked at again without that step.
SUSPICIOUS = 1.5
#: What a step chooses for itself and those after it.
CHOICES = ("_gamma", "_ceiling", "_calibrates", "_probation", "_unchecked", "_inverses")


class Objective(KFAC):
    """Loss, penalty and gradient; the part of AdaptiveKFAC that has no curvature.

    Its attributes are set by the class that takes steps.
    """

    _lam: LevenbergMarquardt
    _decay: float
    _probation: int
    _unchecked: float | None
    _start: list[Tensor] | None = None  # the parameters before the present step, once it has left them

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of the model's parameters; there is one objective and one damping for all of them.

        Args:
            param_group: ``params``.

        Raises:
            ValueError: It has a hyper-parameter of its own.
        """
        given = param_group.items() if isinstance(param_group, dict) else ()
        own = {key: value for key, value in given if key in self.defaults and value != self.defaults[key]}
        if own:
            raise ValueError(
                f"{type(self).__name__} minimises one objective in all parameters, and chooses its own step size, "
                f"momentum and damping: a group has no {', '.join(f'{key}={value!r}' for key, value in own.items())} "
                "of its own. Leave it out."
            )
        super().add_param_group(param_group)

    def _check_settings(self) -> None:
        """Refuse settings that a scheduler, or anybody else, has changed since: they would have no effect."""
        for group in self._own_groups:
            changed = {key: group[key] for key, value in self.defaults.items() if group.get(key, value) != value}
            if changed:
                raise ValueError(
                    f"{type(self).__name__} chooses its own step size, momentum and damping, so that "
                    f"{', '.join(f'{key}={value!r}' for key, value in changed.items())}, as param_groups say since its "
                    "construction, would have no effect. Leave out the scheduler, or whatever else set it."
                )

    def _reset_settings(self) -> None:
        """Let groups from a saved state say again what the constructor was given."""
        for group in self._own_groups:
            group.update(self.defaults)

    def _free(self) -> list[Tensor]:
        """The parameters that are not frozen now: the others are constants of the objective."""
        params = super()._free()
        stepped = [p for p, _ in self._members() if "previous" in self.state[p]]
        if stepped and list(map(id, stepped)) != list(map(id, params)):
            # The last step was one in other parameters: it can be neither gone on with nor taken back.
            for parameter in stepped:
                del self.state[parameter]["previous"]
            self._probation, self._unchecked = PROBATION, None
        return params

    @contextmanager
    def _undone_on_error(self, params: list[Tensor]) -> Iterator[None]:
        """Put parameters, the last step and what was chosen back if the block raises, by Ctrl-C too.

        Statistics keep what they took in of the mini-batch, and buffers what the forward did to them.
        """
        chosen = {name: getattr(self, name) for name in CHOICES}
        lam, streak = self._lam.value, self._lam.streak
        previous = {p: self.state[p]["previous"] for p in params if "previous" in self.state[p]}
        try:
            yield
        except BaseException:
            if self._start is not None:
                torch._foreach_copy_(params, self._start)
            for parameter in params:
                self.state[parameter].pop("previous", None)
            for parameter, change in previous.items():
                self.state[parameter]["previous"] = change
            for name, value in chosen.items():
                setattr(self, name, value)
            self._lam.value, self._lam.streak = lam, streak
            self._gatherer.reset()
            raise
        finally:
            self._start = None

    def _leave(self, params: list[Tensor]) -> list[Tensor]:
        """Copy the parameters before a trial moves them; the first copy is what a step that raises goes back to."""
        saved = [p.clone() for p in params]
        if self._start is None:
            self._start = saved
        return saved

    def _gradient(self, call: Closure, params: list[Tensor]) -> tuple[float, list[Tensor]]:
        """Evaluate loss and gradient; take the step before back if they are not finite, or if it blew the loss up."""
        previous = [self.state[p].get("previous") for p in params]
        if self._steps == 0 or any(v is None for v in previous):
            return self._finite_gradient(call, params)
        put_back = remembered_buffers(self._gatherer.root)
        try:
            # What the step before may have blown up is in no statistics, and in no buffer, before it was looked at.
            with self._gatherer.held_back() as take:
                loss = call.evaluate()
                found = float(loss)
                if math.isfinite(found) and not self._blew_up(found):
                    if self._gatherer.reads_graph:  # which the gradient frees
                        take()
                        return self._finite(call, loss, params)
                    result = self._finite(call, loss, params)
                    take()
                    return result
            del loss  # with its graph
        except FloatingPointError:
            found = math.inf
        put_back()
        call.rewind()
        here = self._leave(params)
        torch._foreach_sub_(params, previous)
        if math.isfinite(found) and call.value() >= found:
            torch._foreach_copy_(params, here)  # a hard mini-batch, not a bad step
            self._start = None
            return self._finite_gradient(call, params)
        result = self._finite_gradient(call, params)  # if it is not finite here, the data are to blame, not the step
        for parameter in params:
            del self.state[parameter]["previous"]
        self._probation, self._lam.streak = PROBATION, 0
        self._lam.scale(4.0**4)
        return result

    def _blew_up(self, loss: float) -> bool:
        """Whether a loss looks as if the step before, which was not checked, had been a bad one."""
        return self._unchecked is not None and loss > SUSPICIOUS * abs(self._unchecked)

    def _finite_gradient(self, call: Closure, params: list[Tensor]) -> tuple[float, list[Tensor]]:
        self._gatherer.reset()
        return self._finite(call, call.evaluate(), params)

    def _finite(self, call: Closure, loss: Tensor, params: list[Tensor]) -> tuple[float, list[Tensor]]:
        value = float(loss)
        if not math.isfinite(value):
            raise FloatingPointError(f"The loss is {value}; no parameter was changed. Look at the inputs and targets.")
        found = call.differentiate(loss)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]
        check_finite({self._names[id(p)]: g for p, g in zip(params, gradients, strict=True)})
        return value, gradients

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
