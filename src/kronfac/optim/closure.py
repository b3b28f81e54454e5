"""A training loss that can be evaluated again: closures that return it without calling backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.linalg.precision import without_autocast
from kronfac.measuring import apart_from_training, frozen_buffers
from kronfac.operators.passes import random_state, same_random_state, set_random_state


class Closure:
    """The loss of one mini-batch as a function of the present parameters.

    Every evaluation within a step starts from the same random state, so that dropout draws the same masks, and only
    the first one moves the random state and the buffers (running statistics) on.

    Args:
        function: Evaluates the model and returns the loss.
        root: The model.
        params: What to differentiate in.

    Raises:
        TypeError: ``function`` cannot be called.
    """

    def __init__(self, function: Callable[[], Any] | None, root: nn.Module, params: Sequence[Tensor]) -> None:
        if not callable(function):
            raise TypeError(
                "step() needs a closure that evaluates the model and returns the loss, without calling backward: "
                "optimizer.step(lambda: loss_function(model(x), y))."
            )
        self._function, self._root, self._params = function, root, list(params)
        self._state = random_state(root)
        self._differentiates = False  # itself, so that even its value needs a graph

    def evaluate(self) -> Tensor:
        """Evaluate the loss; ``.grad`` is None afterwards.

        Returns:
            The loss, 0-dimensional, with its graph.

        Raises:
            RuntimeError: The closure called backward, or what it returns cannot be differentiated.
        """
        for parameter in self._params:
            parameter.grad = None
        with torch.enable_grad():
            loss = _scalar(self._function())
        if any(parameter.grad is not None for parameter in self._params):
            raise RuntimeError(
                "The closure called backward(): this optimiser differentiates the loss itself. Return the loss only: "
                "optimizer.step(lambda: loss_function(model(x), y))."
            )
        if not loss.requires_grad:
            raise RuntimeError("The closure's loss carries no gradient: do not detach it, nor use torch.no_grad().")
        return loss

    @without_autocast  # derivatives have the formats that the forward chose
    def differentiate(self, loss: Tensor) -> list[Tensor | None]:
        """Compute the gradient of the loss.

        Args:
            loss: From :meth:`evaluate`; its graph is freed.

        Returns:
            One tensor for each parameter, None where the loss does not depend on it.
        """
        return list(torch.autograd.grad(loss, self._params, allow_unused=True))

    def rewind(self) -> None:
        """Go back to the random state that the step began with: what follows is its first evaluation again."""
        set_random_state(self._root, self._state)

    def value(self) -> float:
        """Evaluate the loss at the present parameters, without a trace in buffers, random state or statistics.

        Returns:
            The loss.
        """
        if not self._differentiates:
            try:
                with torch.no_grad():
                    return self._value()
            except RuntimeError:
                # Of derivatives that the model's outputs are made of, or the loss: the residual of a differential
                # equation, forces of an energy. What is wrong otherwise shows again.
                self._differentiates = True
        with torch.enable_grad():
            return self._value()

    def _value(self) -> float:
        with apart_from_training(), frozen_buffers(self._root), same_random_state(self._root, self._state):
            return float(_scalar(self._function()).detach())

    def check_repeatable(self, loss: float) -> None:
        """Refuse a closure that does not return the same loss for the same parameters.

        Args:
            loss: What it returned first.

        Raises:
            RuntimeError: It returns something else now.
        """
        again = self.value()
        if math.isfinite(loss) and not math.isclose(again, loss, rel_tol=1e-4, abs_tol=1e-6):
            raise RuntimeError(
                f"The closure returned {loss:.6g} and then {again:.6g} for the same parameters and the same state of "
                "torch's random generators. Draw the batch, and any randomness that is not torch's, outside of it."
            )


def evaluated(closure: Callable[[], Any], params: Sequence[Tensor]) -> tuple[Any, bool]:
    """Evaluate a closure that may call backward, or leave that to the optimiser.

    Args:
        closure: Returns the loss.
        params: What the optimiser moves.

    Returns:
        The loss, and whether the gradients are the optimiser's own, to be forgotten after the step.

    Raises:
        RuntimeError: There are no gradients, and what was returned is a loss that has none.
    """
    fresh = all(parameter.grad is None for parameter in params)
    with torch.enable_grad():
        loss = closure()
        if not fresh or any(parameter.grad is not None for parameter in params):
            return loss, False
        if is_left_out(loss):
            return loss, False
        if not (isinstance(loss, Tensor) and loss.requires_grad):
            raise RuntimeError("The closure left no gradients, and returned no loss that can be differentiated.")
        without_autocast(_scalar(loss).backward)()
    return loss, True


def is_left_out(loss: Any) -> bool:
    """Whether a closure that left no gradients says that there is nothing to step in.

    Training frameworks call the optimiser with a closure for a batch that is to be skipped, too, or for a pass that
    only renews running statistics. They return no loss then, or one whose graph is gone; a loss that still has its
    graph is one of which backward was forgotten.

    Args:
        loss: What it returned.

    Returns:
        True if so.
    """
    return loss is None or (isinstance(loss, Tensor) and not loss.requires_grad)


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"The closure must return the loss, a tensor with one number, not {type(loss).__name__}.")
    if loss.numel() != 1:
        raise ValueError(f"The closure must return one number, not a tensor of shape {tuple(loss.shape)}; reduce it.")
    return loss.reshape(())
