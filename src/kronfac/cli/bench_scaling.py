"""``kronfac bench --scaling``: how the parts' cost grows with one size of the network or its batch."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kronfac.cli.analyse.work import threads_of, working
from kronfac.cli.display import print_table
from kronfac.cli.options import assignments, words
from kronfac.experiments.bench import Limits, Point, get_family, of_parts, planned, scale
from kronfac.experiments.bench.scaling import WARM_UP
from kronfac.experiments.bench.scaling_files import MARKDOWN, PICTURE, POINTS, merged, read_points, view, write_points
from kronfac.experiments.environment import environment, warning
from kronfac.experiments.errors import ExperimentError, need
from kronfac.experiments.files import make_folder
from kronfac.experiments.lock import locked


@dataclass(frozen=True)
class Asked:
    """What the command was asked for.

    Attributes:
        axes: Names of families with commas between them.
        sizes: Texts like ``width=256,512``.
        rounds: Rounds that count, at most.
        only: Parts with commas between them, or None for all.
        device: Where to compute.
        precision: The number format.
        processor_time: Whether to count this process's processor time.
        threads: Torch threads, or None.
        budget: Seconds for a point.
        memory_limit: GiB for a point, or None.
        out: The folder, or None.
        fresh: Whether points of an earlier call are thrown away.
        as_json: Whether JSON is printed.
    """

    axes: str
    sizes: Sequence[str]
    rounds: int
    only: str | None
    device: str
    precision: str
    processor_time: bool
    threads: int | None
    budget: float
    memory_limit: float | None
    out: Path | None
    fresh: bool
    as_json: bool


def bench_scaling(asked: Asked) -> None:
    """Measure, write after each point, and print.

    Args:
        asked: What was asked for.
    """
    plan = planned(words(asked.axes, "--scaling"), _sizes(asked.sizes))
    wanted = of_parts(None if asked.only is None else words(asked.only, "--only"))
    limits = Limits(asked.budget, None if asked.memory_limit is None else asked.memory_limit * 2**30)
    folder = None if asked.out is None else make_folder(asked.out)
    if folder is not None:
        for module in ("pandas", "matplotlib"):
            need(module, "experiments")
    with (
        locked(folder),
        threads_of(asked.threads),
        working(sum(map(len, plan.values())) * (asked.rounds + WARM_UP)) as work,
    ):
        machine = environment()
        setting = {
            "parts": list(wanted),
            "rounds": asked.rounds,
            "threads": torch.get_num_threads(),
            "device": asked.device,
            "precision": asked.precision,
            "clock": "processor" if asked.processor_time else "wall",
            "torch": torch.__version__,
            "processor": machine.get("gpu") if asked.device == "cuda" else machine["processor"],
        }
        if folder is not None and asked.fresh:
            (folder / POINTS).unlink(missing_ok=True)
        known = [] if folder is None else read_points(folder, setting)
        found: list[Point] = []
        for point in scale(
            plan,
            asked.rounds,
            only=wanted,
            device=asked.device,
            precision=asked.precision,
            processor_time=asked.processor_time,
            limits=limits,
            known=known,
            advance=work.begin,
        ):
            found.append(point)
            work.message(_line(point, point in known))
            if folder is not None:
                write_points(folder, merged(found, known), setting, machine, wanted)
    if busy := warning(machine):
        print(f"note: {busy}", file=sys.stderr)
    if asked.as_json:
        content = {"setting": setting, "machine": machine, "points": [point.as_dict() for point in found]}
        print(json.dumps(content, indent=2))
        return
    for axis in plan:
        print_table(view(found, axis, wanted), f"{axis}: {get_family(axis).about}")
        print()
    if folder is not None:
        print(f"table: {folder / MARKDOWN}")
        print(f"picture: {folder / PICTURE}")


def _sizes(texts: Sequence[str]) -> Mapping[str, list[int]]:
    found = {}
    for axis, values in assignments(texts, "--sizes").items():
        members = words(values, "--sizes")
        for member in members:
            if not member.isdecimal():
                raise ExperimentError(f"--sizes must be whole numbers with commas between them, got {member!r}")
        found[axis] = [int(member) for member in members]
    return found


def _line(point: Point, known: bool) -> str:
    place = f"{point.axis} {point.size}"
    if point.skipped:
        return f"{place} is skipped: {point.skipped}"
    return f"{place}: {'already there' if known else f'{point.rounds} rounds'}"
