"""Exponential average of the iterates (Polyak & Juditsky 1992; Algorithm 1 of Grosse & Martens 2016)."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def update_average(params: Sequence[Tensor], state: MutableMapping[Tensor, Any], decay: float, steps: int) -> None:
    """Take the present parameters into their averages.

    Args:
        params: The parameters.
        state: The optimiser's state; holds the averages.
        decay: ``ξ``.
        steps: Number of iterates averaged before.
    """
    # The plain mean of the iterates until 1/(1-ξ) of them were seen: the first point does not linger.
    weight = max(1.0 - decay, 1.0 / (steps + 1))
    for parameter in params:
        if "average" not in state[parameter]:
            state[parameter]["average"] = parameter.detach().clone(memory_format=torch.preserve_format)
    torch._foreach_lerp_([state[p]["average"] for p in params], [p.detach() for p in params], weight)


@contextmanager
def swapped_in(params: list[nn.Parameter], state: MutableMapping[Tensor, Any]) -> Iterator[None]:
    """Swap averaged parameters in within the block.

    Args:
        params: The parameters.
        state: The optimiser's state.

    Yields:
        Nothing.

    Raises:
        RuntimeError: There is no average yet.
    """
    held = [(p, state[p]["average"]) for p in params if "average" in state[p]]
    if not held:
        raise RuntimeError("averaged() needs at least one step.")
    saved = [p.detach().clone() for p, _ in held]
    with torch.no_grad():
        for parameter, average in held:
            parameter.copy_(average)
    try:
        yield
    finally:
        with torch.no_grad():
            for (parameter, _), value in zip(held, saved, strict=True):
                parameter.copy_(value)
