"""Statistics of a part of the batch: how far they are from those of all of it, and what they save.

    OMP_NUM_THREADS=1 python benchmarks/sub_batch.py [--workloads autoencoder,kfc,resnet20] [--shares 8,4,2]
        [--draws 3] [--running 40] [--rounds 10] [--wall-clock]

The workloads of `kronfac bench` at their initial weights, on made-up data. For each share m/N of the batch:

- A and G: relative Frobenius error of the factors against those of the whole batch, the same labels drawn, averaged
  over layers (`kronfac.analysis.sub_batch_error`) and over draws of data and labels;
- over √(1/m − 1/N): the mean of the two errors, over that of the first line, as the square root of the law of large
  numbers has it: 1 where it holds;
- cosine: between the gradient preconditioned by these statistics and by those of the whole batch, with factored damping
  of λ = 0.1 and 0.001 of the mean eigenvalue; `running` is the same with the running averages of `--running` batches,
  each of new data and labels, as an optimiser has them (ema 0.95);
- extra: what gathering them, as the optimiser does, adds to forward+backward, over forward+backward; and over the extra
  of the whole batch. All of them run in turn in each round, by processor time unless `--wall-clock`; medians.

The line `1, new labels` is the whole batch against itself with other labels: the error that sampling labels leaves in
every estimate, whatever its part.
"""

from __future__ import annotations

import argparse
import math
import statistics
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

import kronfac as kf
from kronfac.curvature import BlockDiagonal
from kronfac.experiments.bench.steps import KINDS, make_kfac
from kronfac.experiments.bench.timing import clock_of, timed
from kronfac.experiments.bench.workloads import Workload, make
from kronfac.optim import KFAC
from kronfac.optim.refresh import refresh

DAMPINGS = (0.1, 0.001)
WHOLE, AGAIN = "1", "1, new labels"
WARM_UP = 2


@dataclass
class Line:
    """What is printed of one share.

    Attributes:
        input: Errors of the A of each draw.
        output: Errors of the G of each draw.
        cosines: Cosines of each draw, by damping.
        running: Cosines of running averages, by damping.
        times: Seconds of each round.
    """

    input: list[float] = field(default_factory=list)
    output: list[float] = field(default_factory=list)
    cosines: dict[float, list[float]] = field(default_factory=lambda: {damping: [] for damping in DAMPINGS})
    running: dict[float, list[float]] = field(default_factory=lambda: {damping: [] for damping in DAMPINGS})
    times: list[float] = field(default_factory=list)


def directions(optimizer: KFAC, gradients: dict[str, Tensor], damping: float) -> Tensor:
    """Precondition by the statistics that an optimiser holds.

    Args:
        optimizer: Whose.
        gradients: By parameter name.
        damping: ``λ``.

    Returns:
        One vector, in float64.
    """
    found, inverses = optimizer._estimator.statistics, {}
    refresh(inverses, found, dict.fromkeys(found, damping).__getitem__, optimizer._rule)
    optimizer._inverses = inverses
    return torch.cat([d.double().flatten() for d in optimizer._directions(gradients).values()])


def mean_eigenvalue(curvature: BlockDiagonal) -> float:
    """Trace over the number of parameters with curvature.

    Args:
        curvature: The curvature.

    Returns:
        The mean.
    """
    blocks = curvature.blocks.values()
    return sum(float(block.trace()) for block in blocks) / sum(block.shape.numel() for block in blocks)


def gather(work: Workload, optimizers: list[KFAC], only: KFAC | None) -> None:
    """Run forward and backward, one of the optimisers gathering.

    Args:
        work: The workload.
        optimizers: All that watch its model.
        only: The one, or None.
    """
    with ExitStack() as stack:
        for optimizer in optimizers:
            if optimizer is not only:
                stack.enter_context(optimizer.paused())
        work.forward_backward()
    if only is not None:
        only._gatherer.reset()


def errors(name: str, sizes: dict[str, int], draw: int, lines: dict[str, Line]) -> None:
    """Measure errors of one draw of weights, data and labels.

    Args:
        name: The workload.
        sizes: Examples by line.
        draw: Its number, the seed.
        lines: Where they are put.
    """
    work = make(name, seed=draw)
    batch, options = (work.inputs, work.targets), {"approximation": work.approximation}
    for row in kf.analysis.sub_batch_error(
        work.model, work.likelihood, batch, examples=list(sizes.values()), seed=draw, **options
    ):
        if row["layer"] == "*" and row["factor"] in ("input", "output"):
            label = next(label for label, size in sizes.items() if size == row["examples"])
            getattr(lines[label], row["factor"]).append(row["error"])
    one, other = (kf.estimate(work.model, work.likelihood, batch, seed=s, **options).blocks for s in (draw, draw + 100))
    factors = [(a.tensors(), b.tensors()) for a, b in zip(one.values(), other.values(), strict=True)]
    changes = [float((b["output"] - a["output"]).norm() / a["output"].norm()) for a, b in factors if "output" in a]
    lines[AGAIN].input.append(0.0)
    lines[AGAIN].output.append(statistics.fmean(changes))


def everyone(work: Workload, sizes: dict[str, int], draw: int) -> dict[str, KFAC]:
    """Make an optimiser for each line.

    Args:
        work: The workload.
        sizes: Examples by line.
        draw: Seed of the labels.

    Returns:
        Optimisers of one model, by line.
    """

    def seeded(seed: int, examples: int | None) -> KFAC:
        return make_kfac(work, stats_examples=examples, stats_every=1, generator=torch.Generator().manual_seed(seed))

    made = {WHOLE: seeded(draw, None), AGAIN: seeded(draw + 100, None)}
    return made | {label: seeded(draw, size) for label, size in sizes.items()}


def cosines(name: str, sizes: dict[str, int], draw: int, batches: int) -> dict[str, dict[float, float]]:
    """Compare preconditioned gradients.

    Args:
        name: The workload.
        sizes: Examples by line.
        draw: Seed of weights, data and labels.
        batches: Of how many batches the running averages are; the gradient is the last one's.

    Returns:
        Cosines to the direction of the whole batch, by line and damping.
    """
    work = make(name, seed=draw)
    made = everyone(work, sizes, draw)
    for number in range(batches):
        if number:
            fresh = make(name, seed=1000 * (draw + 1) + number)
            work.inputs, work.targets = fresh.inputs, fresh.targets
        work.forward_backward()  # all of them gather
        for optimizer in made.values():
            optimizer._gatherer.reset()
    gradients = {key: p.grad for key, p in work.model.named_parameters() if p.grad is not None}
    scale = mean_eigenvalue(made[WHOLE].curvature())
    found: dict[str, dict[float, float]] = {label: {} for label in made}
    with torch.no_grad():
        for damping in DAMPINGS:
            truth = directions(made[WHOLE], gradients, damping * scale)
            for label, optimizer in made.items():
                other = directions(optimizer, gradients, damping * scale)
                found[label][damping] = float(other @ truth / (other.norm() * truth.norm()))
    return found


def costs(name: str, sizes: dict[str, int], rounds: int, wall_clock: bool, lines: dict[str, Line]) -> list[float]:
    """Time forward and backward with statistics of every part, in turn.

    Args:
        name: The workload.
        sizes: Examples by line.
        rounds: How many rounds count.
        wall_clock: Whether to count the time that passed.
        lines: Where times are put.

    Returns:
        Seconds without statistics.
    """
    work, clock, base = make(name), clock_of("cpu", processor_time=not wall_clock), []
    made = {WHOLE: make_kfac(work)} | {label: make_kfac(work, stats_examples=size) for label, size in sizes.items()}
    for optimizer in made.values():
        optimizer._steps = KINDS["kfac with statistics"][0]
    watching = list(made.values())
    for number in range(rounds + WARM_UP):
        seconds = timed(lambda: gather(work, watching, None), clock)
        if number >= WARM_UP:
            base.append(seconds)
        for label, optimizer in made.items():
            seconds = timed(lambda optimizer=optimizer: gather(work, watching, optimizer), clock)  # type: ignore[misc]
            if number >= WARM_UP:
                lines[label].times.append(seconds)
    return base


def report(name: str, sizes: dict[str, int], lines: dict[str, Line], base: list[float], batch: int) -> None:
    """Print the table of one workload.

    Args:
        name: The workload.
        sizes: Examples by line.
        lines: What was measured.
        base: Seconds without statistics.
        batch: Examples of the batch.
    """
    middle = statistics.median(base)
    print(f"\n{name}: batch {batch}, forward+backward {1e3 * middle:.1f} ms\n")
    each = [f"{what}, {damping:g}" for what in ("cosine", "running") for damping in DAMPINGS]
    titles = ("m/N", "m", "A", "G", "over √(1/m − 1/N)", *each, "extra", "of all")
    print("| " + " | ".join(titles) + " |\n" + "| --- " * len(titles) + "|")

    def extra(line: Line) -> float:
        return statistics.median(t - b for t, b in zip(line.times, base, strict=True)) / middle

    first: float | None = None
    for label, line in lines.items():
        size = sizes.get(label, batch)
        a, g = (statistics.fmean(values) if values else 0.0 for values in (line.input, line.output))
        law = "–"
        if size < batch:
            ratio = (a + g) / math.sqrt(1 / size - 1 / batch)
            first = ratio if first is None else first
            law = f"{ratio / first:.2f}"
        figures = [*line.cosines.values(), *line.running.values()]
        cosines = [f"{statistics.fmean(values):.3f}" if values else "–" for values in figures]
        times = [f"{extra(line):.2f}", f"{extra(line) / extra(lines[WHOLE]):.2f}"] if line.times else ["–", "–"]
        print("| " + " | ".join((label, str(size), f"{a:.3f}", f"{g:.3f}", law, *cosines, *times)) + " |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="autoencoder,kfc,resnet20")
    parser.add_argument("--shares", default="8,4,2", help="N/m, one for each line")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--running", type=int, default=40, help="batches of the running averages; 0: none")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--wall-clock", action="store_true")
    options = parser.parse_args()
    for name in options.workloads.split(","):
        batch = len(make(name).inputs)
        sizes = {f"1/{share}": max(1, batch // int(share)) for share in options.shares.split(",")}
        lines = {label: Line() for label in (*sizes, WHOLE, AGAIN)}
        for draw in range(options.draws):
            errors(name, sizes, draw, lines)
            for label, found in cosines(name, sizes, draw, 1).items():
                for damping, value in found.items():
                    lines[label].cosines[damping].append(value)
        if options.running:
            for label, found in cosines(name, sizes, 0, options.running).items():
                for damping, value in found.items():
                    lines[label].running[damping].append(value)
        base = costs(name, sizes, options.rounds, options.wall_clock, lines)
        report(name, sizes, lines, base, batch)


if __name__ == "__main__":
    main()
