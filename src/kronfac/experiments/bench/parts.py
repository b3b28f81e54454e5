"""Cost of each part of KFAC over one forward+backward, measured side by side in one process.

Every round runs each part once, in turn, so that what else the machine does falls on all of them alike; the figures are
medians over rounds, as ratios to forward+backward of the same model and batch, with the quartiles of the ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from kronfac.experiments.bench.workloads import Workload, make
from kronfac.optim import KFAC, TKFAC
from kronfac.optim.background import submit
from kronfac.optim.preconditioning import refresh, snapshot

#: Forwards and backwards beside which an asynchronous inverse is computed.
BESIDE = 10
#: Rounds before those that count.
_WARM_UP = 3

Clock = Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over rounds.

    Attributes:
        median: The median.
        low: The lower quartile.
        high: The upper quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Summarise values.

        Args:
            values: One for each round.

        Returns:
            Their quartiles.
        """
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(middle, low, high)

    def as_dict(self) -> dict[str, float]:
        """Return the three numbers by name."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def timed(function: Callable[[], object], clock: Clock) -> float:
    """Measure one call.

    Args:
        function: What to call.
        clock: Gives seconds.

    Returns:
        Seconds.
    """
    start = clock()
    function()
    return clock() - start


def parts(work: Workload) -> dict[str, Callable[[], object]]:
    """Make the parts to time.

    Args:
        work: The workload.

    Returns:
        Functions by name.
    """
    optimizer = KFAC(work.model, work.likelihood, lr=0.0, momentum=0.9, damping=1.0, stats_every=1, burn_in=0)

    def with_statistics() -> None:
        work.forward_backward()
        optimizer._gatherer.reset()

    def without() -> None:
        with optimizer.paused():
            work.forward_backward()

    other = make(work.name)
    paired = TKFAC(other.model, other.likelihood, lr=0.0, damping=1.0, stats_every=1, burn_in=0)

    def with_paired_statistics() -> None:
        other.forward_backward()
        paired._gatherer.reset()

    with_statistics()
    optimizer.step()
    gradients = {name: p.grad for name, p in work.model.named_parameters() if p.grad is not None}
    damping = dict.fromkeys(optimizer._estimator.statistics, 1.0)

    def inverse() -> None:
        refresh({}, optimizer._estimator.statistics, damping.__getitem__, optimizer._rule)

    def inverse_beside() -> None:
        statistics, rule = optimizer._estimator.statistics, optimizer._rule
        pending = submit(lambda: snapshot(statistics, damping.__getitem__, rule), 0, BESIDE)
        for _ in range(BESIDE):
            without()
        pending.result()

    def alone() -> None:
        for _ in range(BESIDE):
            without()

    def precondition() -> None:
        optimizer._directions(gradients)

    return {
        "forward+backward": without,
        "with statistics": with_statistics,
        "with statistics of TKFAC": with_paired_statistics,
        "inverse": inverse,
        "alone": alone,
        "inverse beside": inverse_beside,
        "precondition": precondition,
    }


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
    make_optimizer = {
        "sgd": lambda: torch.optim.SGD(work.model.parameters(), lr=0.0, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(work.model.parameters(), lr=0.0),
        "kfac": lambda: KFAC(work.model, work.likelihood, lr=0.0, damping=1.0, burn_in=0, kl_clip=None),
        "kfac, asynchronous": lambda: KFAC(
            work.model, work.likelihood, lr=0.0, damping=1.0, burn_in=0, kl_clip=None, asynchronous=20
        ),
        "kfac, default clip": lambda: KFAC(work.model, work.likelihood, lr=0.0, damping=1.0, burn_in=0),
    }
    optimizer = make_optimizer[kind]()

    def one() -> None:
        optimizer.zero_grad()
        work.loss(work.model(work.inputs), work.targets).backward()
        optimizer.step()

    if isinstance(optimizer, KFAC):
        one()
        optimizer._steps = 100  # past the geometric start, at a multiple of the inverse period
    return lambda: sum(timed(one, clock) for _ in range(steps)) / steps


def measure(
    name: str,
    rounds: int,
    *,
    whole_steps: bool = True,
    processor_time: bool = False,
    advance: Callable[[str], None] = lambda _: None,
) -> dict[str, Spread]:
    """Measure one workload.

    Args:
        name: The workload.
        rounds: How many rounds count.
        whole_steps: Whether to time training steps of optimisers too.
        processor_time: Count what this process was given by the machine instead of the time that passed; right with one
            thread only, and blind to work beside it.
        advance: Called with a note after each round.

    Returns:
        Milliseconds of forward+backward, and all other parts over it.
    """
    clock = time.process_time if processor_time else time.perf_counter
    functions = parts(make(name))
    times: dict[str, list[float]] = {part: [] for part in functions}
    for round_ in range(rounds + _WARM_UP):
        for part, function in functions.items():
            seconds = timed(function, clock)
            if round_ >= _WARM_UP:
                times[part].append(seconds)
        advance(f"{name}: parts")
    base = times.pop("forward+backward")
    middle = statistics.median(base)
    result = {"forward+backward, ms": Spread.of([1e3 * t for t in base])}

    def extra(values: list[float], over: list[float]) -> Spread:
        return Spread.of([(v - o) / middle for v, o in zip(values, over, strict=True)])

    result["statistics"] = extra(times.pop("with statistics"), base)
    result["statistics of TKFAC"] = extra(times.pop("with statistics of TKFAC"), base)
    result["inverse"] = Spread.of([t / middle for t in times.pop("inverse")])
    alone, beside = times.pop("alone"), times.pop("inverse beside")
    if not processor_time:
        result["inverse, asynchronous, visible"] = extra(beside, alone)
    result |= {part: Spread.of([t / middle for t in values]) for part, values in times.items()}
    return result | (_whole_steps(name, rounds, clock, advance) if whole_steps else {})


def _whole_steps(name: str, rounds: int, clock: Clock, advance: Callable[[str], None]) -> dict[str, Spread]:
    steps = {
        kind: whole(make(name), kind, 100 if kind.startswith("kfac") else 20, clock)
        for kind in ("sgd", "adamw", "kfac", "kfac, asynchronous", "kfac, default clip")
    }
    plain = make(name)

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


def advances(rounds: int, whole_steps: bool) -> int:
    """How often :func:`measure` calls ``advance`` for a workload."""
    return rounds + _WARM_UP + (5 * whole_rounds(rounds) if whole_steps else 0)
