"""Whole training steps: over a period of KFAC's refreshes, or each kind by itself where a period is too long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kronfac.experiments.bench.workloads import Workload
from kronfac.optim import KFAC

#: Steps of a KFAC past its start, with the default periods of 10 and 100, at which nothing, statistics, and statistics
#: and inverses are due; and how many of a hundred steps are of the kind.
KINDS = {"kfac": (101, 90), "kfac with statistics": (110, 9), "kfac with refresh": (200, 1)}


def make_kfac(work: Workload, **options: Any) -> KFAC:
    """Make a KFAC that moves nothing, with the default periods and without a clip unless the options say otherwise.

    Args:
        work: The workload.
        **options: Of KFAC.

    Returns:
        The optimiser, which has taken no step.
    """
    options = {"approximation": work.approximation, "burn_in": 0, "kl_clip": None, **options}
    return KFAC(work.model, work.likelihood, lr=0.0, damping=1.0, **options)


def step(work: Workload, optimizer: torch.optim.Optimizer) -> None:
    """Take one training step.

    Args:
        work: The workload.
        optimizer: Of its parameters.
    """
    optimizer.zero_grad()
    work.forward().backward()
    optimizer.step()


def gradients_of(work: Workload) -> dict[str, Tensor]:
    """Gradients by parameter name.

    Args:
        work: The workload, after a backward.

    Returns:
        Those that there are.
    """
    return {name: p.grad for name, p in work.model.named_parameters() if p.grad is not None}


@torch.no_grad()
def directions_of(optimizer: KFAC, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Precondition as a step does, without gradients of its own.

    Args:
        optimizer: It has inverses.
        gradients: By parameter name.

    Returns:
        Directions by parameter name.
    """
    return optimizer._directions(gradients)


def single(work: Workload, optimizer: KFAC) -> dict[str, Callable[[], object]]:
    """Make each kind of step, those of first-order optimisers included, on one copy of the model.

    Args:
        work: The workload.
        optimizer: Its KFAC, of :func:`make_kfac`; it has inverses.

    Returns:
        Functions by kind.
    """
    sgd = torch.optim.SGD(work.model.parameters(), lr=0.0, momentum=0.9)
    adamw = torch.optim.AdamW(work.model.parameters(), lr=0.0)

    def first_order(other: torch.optim.Optimizer) -> Callable[[], object]:
        def run() -> None:
            with optimizer.paused():
                step(work, other)

        return run

    def own(number: int) -> Callable[[], object]:
        def run() -> None:
            optimizer._steps = number
            step(work, optimizer)

        return run

    return {"sgd": first_order(sgd), "adamw": first_order(adamw)} | {kind: own(at) for kind, (at, _) in KINDS.items()}


def combine(times: dict[str, list[float]]) -> list[float]:
    """Mean step over a period from its kinds, round by round.

    Args:
        times: Seconds by kind, of :data:`KINDS` at least.

    Returns:
        Seconds.
    """
    kinds = [(times[kind], share) for kind, (_, share) in KINDS.items()]
    return [
        sum(share * seconds[i] for seconds, share in kinds) / sum(share for _, share in kinds)
        for i in range(len(kinds[0][0]))
    ]
