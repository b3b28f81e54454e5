"""Cost of each part of KFAC over one forward+backward, measured side by side in one run.

    python benchmarks/overhead.py [--workloads autoencoder,kfc,resnet20] [--rounds 30] [--threads 2] [--json FILE]
        [--parts] [--processor-time]

Every round runs each part once, in turn, so that what else the machine does falls on all of them alike; the figures are
medians over rounds, as ratios to forward+backward of the same model and batch, with the quartiles of the ratio.
The visible cost of an asynchronous inverse is what it adds to forwards and backwards meanwhile: on a free core with
fewer threads than cores, and not to be had from ``--processor-time``.
``--parts`` leaves whole steps out; ``--processor-time`` with one thread counts what this process was given, for a
machine that is shared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from workloads import NAMES, Workload, make

import kronfac as kf
from kronfac.optim import KFAC, TKFAC

#: Forwards and backwards beside which an asynchronous inverse is computed.
BESIDE = 10
CLOCKS = {False: time.perf_counter, True: time.process_time}
processor_time = False


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    clock = CLOCKS[processor_time]
    start = clock()
    function()
    return clock() - start


def parts(work: Workload) -> dict[str, Callable[[], object]]:
    """The parts to time, by name."""
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
        from kronfac.optim.preconditioning import refresh

        refresh({}, optimizer._estimator.statistics, damping.__getitem__, optimizer._rule)

    def inverse_beside() -> None:
        from kronfac.optim.background import submit
        from kronfac.optim.preconditioning import snapshot

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


def whole(work: Workload, kind: str, steps: int) -> Callable[[], float]:
    """Mean seconds of a training step of an optimiser, over a whole period of KFAC's refreshes."""
    make_optimizer = {
        "sgd": lambda: torch.optim.SGD(work.model.parameters(), lr=0.0, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(work.model.parameters(), lr=0.0),
        "kfac": lambda: KFAC(work.model, work.likelihood, lr=0.0, damping=1.0, burn_in=0, kl_clip=None),
        "kfac, default clip": lambda: KFAC(work.model, work.likelihood, lr=0.0, damping=1.0, burn_in=0),
    }
    optimizer = make_optimizer[kind]()

    def one() -> None:
        optimizer.zero_grad()
        work.loss(work.model(work.inputs), work.targets).backward()
        optimizer.step()

    if kind.startswith("kfac"):
        for _ in range(100):  # past the geometric start, up to a multiple of the inverse period
            optimizer._steps += 1
        optimizer._steps = 0
        one()
        optimizer._steps = 100
    return lambda: sum(timed(one) for _ in range(steps)) / steps


def measure(name: str, rounds: int, parts_only: bool) -> dict[str, dict[str, float]]:
    """Ratios of all parts of one workload."""
    functions = parts(make(name))
    times: dict[str, list[float]] = {part: [] for part in functions}
    for round_ in range(rounds + 3):
        for part, function in functions.items():
            seconds = timed(function)
            if round_ >= 3:
                times[part].append(seconds)
    base = times.pop("forward+backward")
    result = {"forward+backward, ms": summary([1e3 * t for t in base])}
    middle = statistics.median(base)
    for whose in ("", " of TKFAC"):
        extra = times.pop(f"with statistics{whose}")
        result[f"statistics{whose}"] = summary([(t - b) / middle for t, b in zip(extra, base, strict=True)])
    alone, beside = times.pop("alone"), times.pop("inverse beside")
    visible = [(b - a) / middle for a, b in zip(alone, beside, strict=True)]
    result[f"inverse, asynchronous beside {BESIDE} of them, visible"] = summary(visible)
    for part, values in times.items():
        result[part] = summary([t / middle for t in values])
    if parts_only:
        return result
    kinds = ("sgd", "adamw", "kfac", "kfac, default clip")
    steps = {kind: whole(make(name), kind, 100 if kind.startswith("kfac") else 20) for kind in kinds}
    plain = make(name)
    ratios: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(max(2, rounds // 10)):
        here = statistics.median(timed(plain.forward_backward) for _ in range(10))
        for kind, run in steps.items():
            seconds = run()
            there = statistics.median(timed(plain.forward_backward) for _ in range(10))
            ratios[kind].append(seconds / (0.5 * (here + there)))
            here = there
    result |= {f"whole step, {kind}": summary(values) for kind, values in ratios.items()}
    return result


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(NAMES))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--processor-time", action="store_true")
    options = parser.parse_args()
    global processor_time
    processor_time = options.processor_time
    torch.set_num_threads(options.threads)
    results = {name: measure(name, options.rounds, options.parts) for name in options.workloads.split(",")}
    rows = list(next(iter(results.values())))
    print(f"torch {torch.__version__}, kronfac {kf.__version__}, {options.threads} threads, float32")
    print("| over forward+backward | " + " | ".join(results) + " |")
    print("| --- " * (len(results) + 1) + "|")
    for row in rows:
        cells = [f"{r[row]['median']:.2f} ({r[row]['low']:.2f} to {r[row]['high']:.2f})" for r in results.values()]
        print(f"| {row} | " + " | ".join(cells) + " |")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
