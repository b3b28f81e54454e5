"""Whole training steps: over a period of KFAC's refreshes, or each kind by itself where a period is too long."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kronfac.experiments.bench.timing import Clock, Spread, timed
from kronfac.experiments.bench.workloads import Workload, make
from kronfac.layers import adapt_model
from kronfac.optim import KFAC
from kronfac.optim.reduced import fits

#: Steps of a KFAC past its start, with the default periods of 10 and 100, at which nothing, statistics, and statistics
#: and inverses are due; and how many of a hundred steps are of the kind.
KINDS = {"kfac": (101, 90), "kfac with statistics": (110, 9), "kfac with refresh": (200, 1)}


#: The step that there is only where layers are wide enough.
ROUNDED = "kfac, bfloat16 products"


def rounds_well(work: Workload) -> bool:
    """Whether a workload has layers whose products with inverses can be rounded.

    Args:
        work: The workload.

    Returns:
        True if ``products="bfloat16"`` fits it.
    """
    return work.approximation == "kfac" and any(map(fits, adapt_model(work.model).adapters.values()))


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


def whole(work: Workload, kind: str, steps: int, clock: Clock) -> Callable[[], float]:
    """Make a measurement of whole training steps, over a whole period of KFAC's refreshes.

    Args:
        work: The workload.
        kind: The optimiser.
        steps: How many steps.
        clock: Gives seconds.

    Returns:
        A function that takes the steps and gives the mean seconds of one.
    """
    make_optimizer: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: torch.optim.SGD(work.model.parameters(), lr=0.0, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(work.model.parameters(), lr=0.0),
        "kfac": lambda: make_kfac(work),
        "kfac, asynchronous": lambda: make_kfac(work, asynchronous=20),
        "kfac, default clip": lambda: make_kfac(work, kl_clip="auto"),
        ROUNDED: lambda: make_kfac(work, products="bfloat16"),
    }
    optimizer = make_optimizer[kind]()
    if isinstance(optimizer, KFAC):
        step(work, optimizer)
        optimizer._steps = 100  # past the geometric start, at a multiple of the inverse period
    return lambda: sum(timed(lambda: step(work, optimizer), clock) for _ in range(steps)) / steps


def whole_steps(
    name: str, rounds: int, clock: Clock, device: str, precision: str, advance: Callable[[str], None]
) -> dict[str, Spread]:
    """Measure whole training steps of each optimiser.

    Args:
        name: The workload.
        rounds: Rounds of the parts.
        clock: Gives seconds.
        device: Where to compute.
        precision: The number format.
        advance: Called with a note after each optimiser.

    Returns:
        A mean step over forward+backward, by optimiser.
    """
    plain = make(name, device=device, precision=precision)
    kinds = [
        "sgd",
        "adamw",
        "kfac",
        "kfac, asynchronous",
        "kfac, default clip",
        *([ROUNDED] if rounds_well(plain) else []),
    ]
    steps = {
        kind: whole(make(name, device=device, precision=precision), kind, 100 if kind.startswith("kfac") else 20, clock)
        for kind in kinds
    }

    def reference() -> float:
        return statistics.median(timed(plain.forward_backward, clock) for _ in range(10))

    ratios: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(whole_rounds(rounds)):
        here = reference()
        for kind, run in steps.items():
            seconds = run()
            there = reference()
            ratios[kind].append(seconds / (0.5 * (here + there)))
            here = there
            advance(f"{name}: whole steps, {kind}")
    return {f"whole step, {kind}": Spread.of(values) for kind, values in ratios.items()}


def whole_rounds(rounds: int) -> int:
    """Rounds of whole steps, each of which takes hundreds of steps, for a number of rounds of the parts."""
    return max(2, rounds // 10)
