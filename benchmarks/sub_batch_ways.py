"""Two ways to statistics of a part of the batch: a forward of its own, or the training forward's, cut.

    OMP_NUM_THREADS=1 python benchmarks/sub_batch_ways.py [--workloads autoencoder,kfc,resnet20] [--rounds 5]

What either costs over forward+backward of the whole batch, by processor time, all in turn in each round, medians; and
`pull`, the pull alone, which cutting does not make cheaper. The workloads are those of `kronfac bench`; batch norm is
in eval mode, since under train mode a forward of its own would have another function.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from kronfac.estimator import Estimator
from kronfac.experiments.bench.timing import clock_of, timed
from kronfac.experiments.bench.workloads import Workload, make
from kronfac.operators.passes import run, same_random_state
from kronfac.sources.part import Part
from kronfac.tape import record

SHARES = (8, 4, 2)
WARM_UP = 2


def one_round(work: Workload, estimator: Estimator, measure: Callable[[str, Callable[[], object]], None]) -> None:
    """Time everything once.

    Args:
        work: The workload.
        estimator: Takes the statistics.
        measure: Times a function under a name.
    """
    batch, layers = len(work.inputs), estimator.adaptation.adapters
    measure("forward+backward", work.forward_backward)
    with record(layers) as tape:
        outputs = work.model(work.inputs)

    def cut(part: Part | None) -> None:
        estimator.update(tape, outputs, part=part)

    def apart(part: Part) -> None:
        with same_random_state(work.model):
            with record(layers) as own:
                found = run(work.model, {}, ((work.inputs[: part.examples],), {}), None)
            estimator.update(own, found, part=part)

    measure("all of it", lambda: cut(None))
    measure("pull", lambda: tape.stream(outputs, torch.randn_like(outputs), lambda name, cotangent: None))
    for share in SHARES:
        size = batch // share
        measure(f"1/{share} apart", lambda size=size: apart(Part(size, batch, cut=False)))  # type: ignore[misc]
        measure(f"1/{share} cut", lambda size=size: cut(Part(size, batch, cut=True)))  # type: ignore[misc]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="autoencoder,kfc,resnet20")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    titles = ("extra", "all of it", "pull", *(f"1/{share}: apart, cut" for share in SHARES))
    print("| " + " | ".join(titles) + " |\n" + "| --- " * len(titles) + "|")
    clock = clock_of("cpu", processor_time=True)
    for name in options.workloads.split(","):
        work = make(name)
        work.model.eval()
        generator = torch.Generator().manual_seed(0)
        estimator = Estimator(work.model, work.likelihood, approximation=work.approximation, generator=generator)
        times: dict[str, list[float]] = {}

        def measure(what: str, function: Callable[[], object], times: dict[str, list[float]] = times) -> None:
            times.setdefault(what, []).append(timed(function, clock))

        for _ in range(options.rounds + WARM_UP):
            one_round(work, estimator, measure)
        middle = {what: statistics.median(each[WARM_UP:]) for what, each in times.items()}
        over = {what: f"{seconds / middle['forward+backward']:.2f}" for what, seconds in middle.items()}
        ways = (f"{over[f'1/{share} apart']}, {over[f'1/{share} cut']}" for share in SHARES)
        print("| " + " | ".join((name, over["all of it"], over["pull"], *ways)) + " |", flush=True)


if __name__ == "__main__":
    main()
