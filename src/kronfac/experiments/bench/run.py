"""All that was asked of one workload, with its memory freed after each part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kronfac.experiments.bench.ceilings import Ceilings, ceilings
from kronfac.experiments.bench.parts import TIMED, chosen, measure
from kronfac.experiments.bench.peaks import peaks
from kronfac.experiments.bench.profile import Operator, profiles
from kronfac.experiments.bench.roofline import Floor, costs, floors
from kronfac.experiments.bench.timing import Spread
from kronfac.experiments.bench.workloads import make, prepared


@dataclass
class Found:
    """What was found of one workload in one precision.

    Attributes:
        rows: Milliseconds of forward+backward, and parts over it.
        ceilings: What the machine does at best, where floors were asked for.
        roofline: Floors by part.
        memory: Peaks by name.
        profile: Operators by part.
    """

    rows: dict[str, Spread] = field(default_factory=dict)
    ceilings: Ceilings | None = None
    roofline: dict[str, Floor] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    profile: dict[str, list[Operator]] = field(default_factory=dict)


def run(
    name: str,
    rounds: int,
    *,
    only: Sequence[str] | None = None,
    device: str = "cpu",
    precision: str = "float32",
    processor_time: bool = False,
    advance: Callable[[str], None] = lambda _: None,
) -> Found:
    """Do all that was asked of one workload.

    Args:
        name: The workload.
        rounds: How many rounds count.
        only: Names of `parts.PARTS`; by default what fits workload and device.
        device: Where to compute.
        precision: The number format.
        processor_time: Count this process's processor time.
        advance: Called with a note after each round of the parts.

    Returns:
        What was found.
    """
    wanted, found = chosen(name, device, only), Found()
    if set(TIMED).intersection(wanted):
        with prepared(device, precision):
            found.rows = measure(
                name,
                rounds,
                only=wanted,
                device=device,
                precision=precision,
                processor_time=processor_time,
                advance=advance,
            )
    if "roofline" in wanted:
        with prepared(device, precision):
            found.ceilings = ceilings(device, precision)
            counted = costs(make(name, device=device, precision=precision))
            found.roofline = floors(counted, found.ceilings, found.rows)
    if "memory" in wanted:
        with prepared(device, precision):
            found.memory = peaks(make(name, device=device, precision=precision))
    if "profile" in wanted:
        with prepared(device, precision):
            found.profile = profiles(make(name, device=device, precision=precision))
    return found
