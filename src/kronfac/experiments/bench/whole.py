"""Whole training steps of each optimiser, over whole periods of KFAC's refreshes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from kronfac.experiments.bench.steps import make_kfac, step
from kronfac.experiments.bench.timing import Clock, Spread, timed
from kronfac.experiments.bench.wide import wide_options
from kronfac.experiments.bench.workloads import Workload, make
from kronfac.optim import KFAC


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
    parameters = work.model.parameters()
    optimizer: torch.optim.Optimizer
    if kind == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)
    elif kind == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=0.0)
    else:
        optimizer = make_kfac(work, **kfac_options(work)[kind])
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
    steps = {
        kind: whole(make(name, device=device, precision=precision), kind, 100 if kind.startswith("kfac") else 20, clock)
        for kind in whole_kinds(plain)
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


def kfac_options(work: Workload) -> dict[str, dict[str, Any]]:
    """Options of the KFACs whose whole steps are measured.

    Args:
        work: The workload.

    Returns:
        Options by the optimiser's name.
    """
    return {
        "kfac": {},
        "kfac, asynchronous": {"asynchronous": 20},
        "kfac, default clip": {"kl_clip": "auto"},
        **{f"kfac, {name}": options for name, options in wide_options(work).items()},
    }


def whole_kinds(work: Workload) -> list[str]:
    """Optimisers whose steps are measured.

    Args:
        work: The workload.

    Returns:
        Their names.
    """
    return ["sgd", "adamw", *kfac_options(work)]


def whole_rounds(rounds: int) -> int:
    """Rounds of whole steps, each of which takes hundreds of steps, for a number of rounds of the parts."""
    return max(2, rounds // 10)
