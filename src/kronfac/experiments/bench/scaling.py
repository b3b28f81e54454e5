"""How the parts' cost grows with width, depth, batch, image and kernel, point by point within a budget.

Each point is one network of a family, and its parts are timed in turn as ``parts.measure`` times them. A point takes as
many rounds as fit into its budget of seconds, up to those asked for; one into which not even the fewest rounds would
fit, or whose memory is not there, is not begun, and says so. Seconds are reckoned part by part from the point measured
last of the same family, by the ratio of FLOPs; those of the first from the rate of a large product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kronfac.experiments.bench.ceilings import ceilings
from kronfac.experiments.bench.families import BASE, Demand, Family, get_family
from kronfac.experiments.bench.parts import BOUNDED, in_turn, over_base, parts
from kronfac.experiments.bench.timing import Clock, Spread, clock_of
from kronfac.experiments.bench.workloads import prepared
from kronfac.experiments.environment import free_memory
from kronfac.experiments.errors import ExperimentError, reason_of

#: Rounds that must fit into the budget, and rounds before those that count.
LEAST, WARM_UP = 3, 1
#: The row of milliseconds, and which of the rest of the memory a point may take by default.
_MS, _SHARE = f"{BASE}, ms", 0.75
#: What the parts reach of the rate of a large product, as long as nothing of the family is measured.
_OF_THE_RATE = 1 / 3


@dataclass(frozen=True)
class Point:
    """One network of a family.

    Attributes:
        axis: The family.
        size: Its size.
        rows: Milliseconds of forward+backward, and the parts over it; empty if it was skipped.
        counted: FLOPs of the parts over those of forward and backward.
        rounds: Rounds that count.
        skipped: Why it was not measured, or nothing.
    """

    axis: str
    size: int
    rows: dict[str, Spread] = field(default_factory=dict)
    counted: dict[str, float] = field(default_factory=dict)
    rounds: int = 0
    skipped: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return what `from_dict` takes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Point:
        """Make a point again.

        Args:
            value: From `as_dict`.

        Returns:
            The point.
        """
        return cls(**{**value, "rows": {part: Spread(**spread) for part, spread in value["rows"].items()}})

    def seconds(self) -> dict[str, float]:
        """Return the median seconds of each part."""
        base = self.rows[_MS].median / 1e3
        return {BASE: base} | {part: spread.median * base for part, spread in self.rows.items() if part != _MS}


@dataclass(frozen=True)
class Limits:
    """What a point may take.

    Attributes:
        seconds: For making its network and all its rounds.
        bytes: Memory; None for three quarters of what is there when its turn comes.
    """

    seconds: float = 300.0
    bytes: float | None = None


def planned(axes: Sequence[str], sizes: Mapping[str, Sequence[int]] | None = None) -> dict[str, tuple[int, ...]]:
    """Say which points there will be.

    Args:
        axes: Names of `families.FAMILIES`.
        sizes: Sizes by axis, in place of the family's own.

    Returns:
        Sizes by axis, from small to large.

    Raises:
        ExperimentError: An axis or a size is not to be had, or sizes are given for an axis that is not asked for.
    """
    families, sizes = {axis: get_family(axis) for axis in axes}, sizes or {}
    if others := [axis for axis in sizes if axis not in families]:
        get_family(others[0])
        raise ExperimentError(f"sizes are given for {others[0]!r}, which is not among the axes measured")
    plan = {axis: tuple(sorted(set(sizes.get(axis, family.sizes)))) for axis, family in families.items()}
    for axis, family in families.items():
        for size in plan[axis]:
            family.check(size)
    return plan


def of_parts(only: Sequence[str] | None) -> tuple[str, ...]:
    """Say which parts are measured.

    Args:
        only: Names of `parts.BOUNDED`; all by default.

    Returns:
        The names, in their order.

    Raises:
        ExperimentError: Another part is named.
    """
    if unknown := [part for part in only or () if part not in BOUNDED]:
        raise ExperimentError(f"scaling is measured of {', '.join(BOUNDED)}, not of {unknown[0]!r}")
    return tuple(part for part in BOUNDED if only is None or part in only)


def scale(
    plan: Mapping[str, Sequence[int]],
    rounds: int,
    *,
    only: Sequence[str] | None = None,
    device: str = "cpu",
    precision: str = "float32",
    processor_time: bool = False,
    limits: Limits | None = None,
    known: Sequence[Point] = (),
    advance: Callable[[str], None] = lambda _: None,
) -> Iterator[Point]:
    """Measure points one after the other.

    Args:
        plan: Sizes by axis, of `planned`.
        rounds: How many rounds count, at most.
        only: Names of `parts.BOUNDED`; all by default.
        device: Where to compute.
        precision: The number format.
        processor_time: Count this process's processor time.
        limits: What a point may take.
        known: Points of an earlier call; measured ones are not measured again.
        advance: Called with a note after each round.

    Yields:
        A point for each size, as soon as it is there.
    """
    wanted, limits = of_parts(only), limits or Limits()
    clock = clock_of(device, processor_time)
    earlier = {(point.axis, point.size): point for point in known if point.rows}
    with prepared(device, precision):
        rate = ceilings(device, precision).flops[torch.float32] * _OF_THE_RATE
    for axis, sizes in plan.items():
        family, last = get_family(axis), None
        for size in sizes:
            point = earlier.get((axis, size))
            if point is None:
                demand = family.demand(size)
                reason = _too_much(
                    _round_seconds(demand, wanted, last, rate), demand, min(LEAST, rounds), limits, device
                )
                if reason:
                    point = Point(axis, size, counted=demand.over_base(), skipped=reason)
                else:
                    with prepared(device, precision):
                        point = _point(family, size, wanted, rounds, clock, device, precision, limits.seconds, advance)
            if point.rows:
                last = point
            yield point


def _round_seconds(demand: Demand, wanted: Sequence[str], last: Point | None, rate: float) -> float:
    """Reckon one round: forward and backward, the same with statistics, and the other parts."""
    times = dict.fromkeys((BASE, *wanted), 1) | {BASE: 1 + ("statistics" in wanted)}
    if last is None:
        return sum(number * demand.flops[part] for part, number in times.items()) / rate
    before, seconds = get_family(last.axis).demand(last.size), last.seconds()
    return sum(
        number * max(seconds.get(part, 0.0), 0.0) * demand.flops[part] / before.flops[part]
        for part, number in times.items()
    )


def _too_much(seconds: float, demand: Demand, least: int, limits: Limits, device: str) -> str:
    """Say why a point is not begun. Making it takes about one round."""
    total = seconds * (1 + WARM_UP + least)
    if total > limits.seconds:
        return f"{total:.3g} s reckoned, budget {limits.seconds:g} s"
    there = free_memory(device)
    room = limits.bytes if limits.bytes is not None else None if there is None else _SHARE * there
    if room is not None and demand.bytes > room:
        return f"{demand.bytes / 2**30:.2g} GiB reckoned, limit {room / 2**30:.2g} GiB"
    return ""


def _point(
    family: Family,
    size: int,
    wanted: Sequence[str],
    rounds: int,
    clock: Clock,
    device: str,
    precision: str,
    budget: float,
    advance: Callable[[str], None],
) -> Point:
    counted, start = family.demand(size).over_base(), clock()
    least = min(LEAST, rounds)

    def go_on(done: int) -> bool:
        used = clock() - start
        return done < least or used + used / (1 + WARM_UP + done) < budget

    try:
        functions = parts(family.make(size, device=device, precision=precision), wanted)
        note = f"{family.axis} {size}"
        times = in_turn(functions, rounds, clock, warm_up=WARM_UP, advance=lambda: advance(note), go_on=go_on)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        return Point(family.axis, size, counted=counted, skipped=f"out of memory: {reason_of(error)}")
    done = len(times[BASE])
    return Point(family.axis, size, over_base(times), counted, done)
