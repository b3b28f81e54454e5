"""The mini-batch that the last forward saw, whole or in part, for exact curvature products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kronfac.measuring import couples_examples
from kronfac.operators.passes import random_state
from kronfac.optim.gathering import Gatherer
from kronfac.sources.part import first_of

#: Part of the mini-batch that stands for it (Martens & Grosse 2015, section 8: τ₂), and examples it has at least.
PART, FEWEST = 0.25, 250


@dataclass(frozen=True)
class LastBatch:
    """Arguments of the model's last forward, cut to their first examples.

    Attributes:
        inputs: Positional and keyword arguments.
        targets: Targets, where they were captured.
        whole: What sums over the part are to be multiplied by, to stand for the whole batch.
    """

    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    targets: Any
    whole: float


def last_batch(gatherer: Gatherer, what: str, fraction: float | None = 1.0) -> LastBatch:
    """Cut a part out of the last mini-batch.

    Args:
        gatherer: Holds that forward's arguments.
        what: What needs them, for the error.
        fraction: Which part, in ``(0, 1]``, rounded up to whole examples; None for a quarter, but not fewer than 250
            examples (along the first dimension of every tensor that the model takes), and all of them where a part
            would see another function than the whole: batch norm in train mode, or other dropout masks.

    Returns:
        The part.

    Raises:
        RuntimeError: No forward was seen.
    """
    if gatherer.last is None:
        raise RuntimeError(
            f"{what} needs the arguments of the root module's forward to form curvature products; call the model "
            "itself in the training loop."
        )
    args, kwargs = gatherer.last
    sizes = [v.shape[0] for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim > 0]
    batch = sizes[0] if sizes else 0
    if fraction is not None:
        part = max(1, math.ceil(batch * fraction))
    elif len(set(sizes)) != 1 or couples_examples(gatherer.root) or _draws(gatherer):
        part = batch
    else:
        part = min(max(math.ceil(batch * PART), FEWEST), batch)

    inputs = (tuple(first_of(v, part, batch) for v in args), {k: first_of(v, part, batch) for k, v in kwargs.items()})
    return LastBatch(inputs, first_of(gatherer.last_targets, part, batch), batch / part if batch else 1.0)


def _draws(gatherer: Gatherer) -> bool:
    """Whether torch's random numbers were used since the last forward began."""
    before, now = gatherer.last_random, random_state(gatherer.root)
    return before is None or any(not torch.equal(a, b) for a, b in zip(before, now, strict=True))
