"""Cost of each part of KFAC over one forward+backward, measured side by side in one process.

Every round runs each part once, in turn, so that what else the machine does falls on all of them alike; the figures are
medians over rounds, as ratios to forward+backward of the same model and batch, with the quartiles of the ratio.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kronfac.experiments.bench.steps import KINDS, combine, directions_of, gradients_of, make_kfac, single
from kronfac.experiments.bench.timing import Clock, Spread, clock_of, timed
from kronfac.experiments.bench.whole import whole_kinds, whole_rounds, whole_steps
from kronfac.experiments.bench.wide import BY_ROWS, wide_parts
from kronfac.experiments.bench.workloads import LARGE, Workload, make
from kronfac.experiments.errors import ExperimentError
from kronfac.optim import KFAC, TKFAC
from kronfac.optim.background import submit
from kronfac.optim.refresh import refresh, snapshot

#: What can be asked for by name. ``own`` are statistics from a forward of their own; ``whole`` takes hundreds of
#: steps, ``step`` one of each kind.
PARTS = (
    "statistics",
    "own",
    "tkfac",
    "inverse",
    "asynchronous",
    "precondition",
    "wide",
    "whole",
    "step",
    "roofline",
    "memory",
    "profile",
)
#: The parts whose time the roofline is beside.
BOUNDED = ("statistics", "inverse", "precondition")
#: What is timed in rounds.
TIMED = (*BOUNDED, "wide", "own", "tkfac", "asynchronous", "whole", "step")
#: Forwards and backwards beside which an asynchronous inverse is computed.
BESIDE = 10
#: Rounds before those that count.
_WARM_UP = 3


def chosen(name: str, device: str = "cpu", only: Sequence[str] | None = None) -> tuple[str, ...]:
    """Which parts to measure.

    Args:
        name: The workload.
        device: Where to compute.
        only: Names of :data:`PARTS`; by default what fits workload and device.

    Returns:
        Names, in the order of :data:`PARTS`.

    Raises:
        ExperimentError: A name is unknown, or the part is not to be had on the device.
    """
    if only is None:
        if device == "cuda":
            only = (*BOUNDED, "step", "roofline", "memory")
        elif name.removesuffix("-small") in LARGE:
            only = (*BOUNDED, "step")
        else:
            only = (*BOUNDED, "wide", "own", "tkfac", "asynchronous", "whole")
    if unknown := [part for part in only if part not in PARTS]:
        raise ExperimentError(f"there is no part {unknown[0]!r}; known are {', '.join(PARTS)}")
    if device != "cuda" and "memory" in only:
        raise ExperimentError("memory is read from CUDA's allocator; benchmarks/memory.py measures it on the CPU")
    return tuple(part for part in PARTS if part in only or (part in BOUNDED and "roofline" in only))


def gradients_only(work: Workload, optimizer: KFAC) -> None:
    """Run forward and backward without statistics.

    Args:
        work: The workload.
        optimizer: Its KFAC.
    """
    with optimizer.paused():
        work.forward_backward()


def with_statistics(work: Workload, optimizer: KFAC) -> None:
    """Run forward and backward with statistics.

    Args:
        work: The workload.
        optimizer: Its KFAC.
    """
    optimizer._steps = KINDS["kfac with statistics"][0]
    work.forward_backward()
    optimizer._gatherer.reset()


def inverse(optimizer: KFAC) -> None:
    """Invert all factors.

    Args:
        optimizer: A KFAC with statistics.
    """
    found = optimizer._estimator.statistics
    refresh({}, found, dict.fromkeys(found, 1.0).__getitem__, optimizer._rule)


def started(work: Workload) -> KFAC:
    """Make a KFAC that has taken its first step.

    Args:
        work: The workload; its parameters have gradients afterwards.

    Returns:
        The optimiser.
    """
    optimizer = make_kfac(work)
    work.forward_backward()
    optimizer.step()
    return optimizer


def parts(work: Workload, wanted: Sequence[str]) -> dict[str, Callable[[], object]]:
    """Make the parts to time.

    Args:
        work: The workload.
        wanted: Names of :data:`PARTS`.

    Returns:
        Functions by name.
    """
    optimizer = started(work)
    gradients = gradients_of(work)

    def without() -> None:
        gradients_only(work, optimizer)

    def alone() -> None:
        for _ in range(BESIDE):
            without()

    def inverse_beside() -> None:
        found, rule = optimizer._estimator.statistics, optimizer._rule
        damping = dict.fromkeys(found, 1.0)
        pending = submit(lambda: snapshot(found, damping.__getitem__, rule), 0, BESIDE, work.device)
        for _ in range(BESIDE):
            without()
        pending.result()

    functions: dict[str, Callable[[], object]] = {"forward+backward": without}
    if "statistics" in wanted:
        functions["with statistics"] = lambda: with_statistics(work, optimizer)
    if "own" in wanted:
        functions["with statistics, own forward"] = _beside(
            work, KFAC, lr=0.0, approximation=work.approximation, stats_forward="own"
        )
    if "tkfac" in wanted:
        functions["with statistics of TKFAC"] = _beside(work, TKFAC, lr=0.0)
    if "inverse" in wanted:
        functions["inverse"] = lambda: inverse(optimizer)
    if "asynchronous" in wanted:
        functions |= {"alone": alone, "inverse beside": inverse_beside}
    if "precondition" in wanted:
        functions["precondition"] = lambda: directions_of(optimizer, gradients)
    if "wide" in wanted:
        functions |= wide_parts(work, optimizer, gradients)
    if "step" in wanted:
        functions |= {f"step, {kind}": function for kind, function in single(work, optimizer).items()}
    return functions


def _beside(work: Workload, kind: type[KFAC], **options: Any) -> Callable[[], object]:
    """Forward and backward with the statistics of another optimiser, on a twin of the model."""
    other = make(work.name, device=work.device.type, precision=work.precision)
    optimizer = kind(other.model, other.likelihood, damping=1.0, stats_every=1, **options)

    def run() -> None:
        other.forward_backward()
        optimizer._gatherer.reset()

    return run


def measure(
    name: str,
    rounds: int,
    *,
    only: Sequence[str] | None = None,
    device: str = "cpu",
    precision: str = "float32",
    processor_time: bool = False,
    advance: Callable[[str], None] = lambda _: None,
) -> dict[str, Spread]:
    """Time the parts of one workload.

    Args:
        name: The workload.
        rounds: How many rounds count.
        only: Names of :data:`PARTS`; by default those of :func:`chosen`.
        device: Where to compute.
        precision: The number format.
        processor_time: Count what this process was given by the machine instead of the time that passed; right with one
            thread only, and blind to work beside it.
        advance: Called with a note after each round.

    Returns:
        Milliseconds of forward+backward, and all other parts over it.
    """
    clock = clock_of(device, processor_time)
    wanted = chosen(name, device, only)
    functions = parts(make(name, device=device, precision=precision), wanted)
    times = in_turn(functions, rounds, clock, advance=lambda: advance(f"{name}: parts"))
    rows = over_base(times, visible=not processor_time)
    if "whole" in wanted:
        functions.clear()
        rows |= whole_steps(name, rounds, clock, device, precision, advance)
    return rows


def in_turn(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Clock,
    *,
    warm_up: int = _WARM_UP,
    advance: Callable[[], None] = lambda: None,
    go_on: Callable[[int], bool] = lambda counted: True,
) -> dict[str, list[float]]:
    """Time functions in rounds, each of which runs every one of them once.

    Args:
        functions: By part.
        rounds: How many rounds count, at most.
        clock: Gives seconds.
        warm_up: Rounds before those that count.
        advance: Called after each round.
        go_on: Whether another round is wanted after so many that count.

    Returns:
        Seconds by part, one for each round that counts.
    """
    times: dict[str, list[float]] = {part: [] for part in functions}
    for counted in range(1 - warm_up, rounds + 1):
        for part, function in functions.items():
            seconds = timed(function, clock)
            if counted > 0:
                times[part].append(seconds)
        advance()
        if counted > 0 and not go_on(counted):
            break
    return times


def over_base(times: dict[str, list[float]], visible: bool = True) -> dict[str, Spread]:
    """Turn the seconds of :func:`parts` into rows.

    Args:
        times: Seconds by part, round by round; emptied of what has a row of its own.
        visible: Whether the clock sees work beside this thread, without which asynchronous inverses have no row.

    Returns:
        Milliseconds of forward+backward, and all other parts over it.
    """
    base = times.pop("forward+backward")
    middle = statistics.median(base)
    rows = {"forward+backward, ms": Spread.of([1e3 * t for t in base])}

    def extra(values: list[float], over: list[float]) -> Spread:
        return Spread.of([(v - o) / middle for v, o in zip(values, over, strict=True)])

    for row in ("statistics", "statistics, own forward", "statistics of TKFAC", *BY_ROWS.values()):
        if f"with {row}" in times:
            rows[row] = extra(times.pop(f"with {row}"), base)
    if "inverse" in times:
        rows["inverse"] = Spread.of([t / middle for t in times.pop("inverse")])
    if "alone" in times:
        alone, beside = times.pop("alone"), times.pop("inverse beside")
        if visible:
            rows["inverse, asynchronous, visible"] = extra(beside, alone)
    rows |= {part: Spread.of([t / middle for t in values]) for part, values in times.items()}
    steps = {part.removeprefix("step, "): values for part, values in times.items() if part.startswith("step, ")}
    if steps:
        rows["whole step, kfac, from its steps"] = Spread.of([t / middle for t in combine(steps)])
    return rows


def advances(name: str, rounds: int, wanted: Sequence[str]) -> int:
    """How often :func:`measure` calls ``advance`` for the parts of a workload."""
    if not set(TIMED).intersection(wanted):
        return 0
    whole = len(whole_kinds(make(name))) * whole_rounds(rounds) if "whole" in wanted else 0
    return rounds + _WARM_UP + whole
