"""Whether the rows that look like examples are examples: tried, by leaving one out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kronfac.estimator import Estimator
from kronfac.graph import saved_plainly
from kronfac.measuring import couples_examples, kept_modes
from kronfac.operators.passes import run, same_random_state
from kronfac.sources import require_examples
from kronfac.sources.part import rest_of, tensors_of
from kronfac.tape import Tape, record


def check_examples(
    estimator: Estimator, tape: Tape, inputs: Any, batch: int, pick: Callable[[Any], Tensor] | None
) -> None:
    """Refuse rows that are as many as the examples by chance, where examples must be kept apart.

    Position indices ``[T, d]``, and sequences with time first, look like ``T`` examples where ``T`` is the batch.
    Without the first example, in eval mode, all layers must see one row less, and the outputs of the others must stay
    what they are. A model that does not take a part of its batch tells nothing.

    Args:
        estimator: What needs the examples, or does not.
        tape: A recorded forward pass; one that does not look as if rows were examples is left to the source.
        inputs: Its batch's arguments for the model, a pair ``(tuple, dict)`` among others.
        batch: Number of the outputs it gave.
        pick: Picks the output tensor.

    Raises:
        ValueError: They are not.
    """
    what, model = estimator.needs_examples, estimator.model
    if what is None or batch < 2 or not any(t.ndim and len(t) == batch for t in tensors_of(inputs)):
        return
    if any(call.adapter.positions(call.input)[0] != batch for call in tape.calls.values()):
        return
    adapters = estimator.adaptation.adapters
    with kept_modes(model), same_random_state(model), saved_plainly(), torch.enable_grad():
        for module in model.modules():
            module.training = False  # not eval(), which may do more
        try:
            whole = run(model, {}, inputs, pick).detach()
            with record(adapters) as fewer:
                others = run(model, {}, rest_of(inputs, batch), pick).detach()
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            return
        coupled = couples_examples(model) or estimator.approximation.couples_examples
    for call in fewer.calls.values():
        require_examples(call.adapter, call.input, batch - 1, what)
    if len(whole) == batch and not (others.shape == whole[1:].shape and (coupled or _close(others, whole[1:]))):
        raise ValueError(
            f"{what} needs the examples one by one, along the first dimension of inputs and outputs; but without the "
            "first of them, the outputs of the others are not what they were. Put the batch first, before time, or use "
            "approximation='kfac' with source='sampled'."
        )


def _close(found: Tensor, wanted: Tensor) -> bool:
    if not found.is_floating_point():
        return True
    error, size = ((t.double().norm()) for t in (found - wanted, wanted))
    return bool(error <= torch.finfo(found.dtype).eps ** 0.5 * size) or not bool(error.isfinite())
