"""Time of KLD-WRM's variants over K-FAC's, measured side by side in one run.

    python benchmarks/kldwrm.py [--rounds 8] [--exact-rounds 3] [--threads 1] [--processor-time] [--json FILE]

The network, the batch and the periods are those of Puiu (2022): statistics and inverses every 30 steps; the damping is
on each factor, so that Q solves the generalised Stein equation. Every round
times one period of 30 steps of each optimiser, each time in another order, so that what else the machine does falls on
all of them alike; ratios are formed within a round, and medians and quartiles over rounds. An epoch is 117 such steps
for all. QE, ten times as slow, gets rounds of its own beside forward+backward and forward alone: its oracle cost.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

import kronfac as kf
from kronfac.damping import EachFactor
from kronfac.experiments.memory import keep_freed_memory
from kronfac.experiments.models import puiu_network

PERIOD, BATCH = 30, 512
SHARED = {"damping_rule": EachFactor(0.01), "weight_decay": 1e-3, "stats_every": PERIOD, "burn_in": 0, "momentum": 0.0}
N_INNER, N_CAP = 10, 4


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A period of mini-batches: the first of them is the first of the period for all."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(BATCH, 1, 28, 28, generator=generator), torch.randint(10, (BATCH,), generator=generator))
        for _ in range(PERIOD)
    ]


def training(kind: str, data: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
    """A period of steps of an optimiser, or of what it is compared with."""
    torch.manual_seed(0)
    model = puiu_network()
    makers = {
        "kfac": lambda: kf.optim.KFAC(
            model, kf.Categorical(), 0.01, ema=0.95, invert_every=PERIOD, kl_clip=0.1, **SHARED
        ),
        "so": lambda: kf.optim.KLDWRM(model, kf.Categorical(), variant="so", rho=0.33, kl_clip=0.1, **SHARED),
        "q": lambda: kf.optim.KLDWRM(
            model, kf.Categorical(), variant="q", rho=0.5, kl_clip=None, rms_clip=0.02, **SHARED
        ),
        "qe": lambda: kf.optim.KLDWRM(
            model, kf.Categorical(), variant="qe", rho=0.5, kl_clip=None, rms_clip=0.02, omega=0.07, n_inner=N_INNER,
            n_cap=N_CAP, **SHARED,
        ),
    }  # fmt: skip
    optimizer = makers[kind]() if kind in makers else torch.optim.SGD(model.parameters(), lr=0.0)

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    def period() -> None:
        for x, y in data:
            if kind == "forward":
                with torch.no_grad():
                    model(x)
            elif kind == "qe":
                optimizer.step(lambda x=x, y=y: loss(x, y))
            else:
                optimizer.zero_grad()
                loss(x, y).backward()
                if kind != "forward+backward":
                    optimizer.step()

    return period


def measure(kinds: list[str], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each kind's period, round by round."""
    data = batches()
    functions = {kind: training(kind, data) for kind in kinds}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    order, shuffle = list(kinds), random.Random(0)
    for number in range(rounds + 1):
        shuffle.shuffle(order)
        for kind in order:
            start = clock()
            functions[kind]()
            if number:  # the first round warms up
                times[kind].append(clock() - start)
    return times


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high}


def word(found: dict[str, float]) -> str:
    """As text."""
    return f"{found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--exact-rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the study does; otherwise page faults are a third of all times, and most of their spread
    clock = time.process_time if options.processor_time else time.perf_counter
    plain = measure(["forward+backward", "kfac", "so", "q"], options.rounds, clock)
    exact = measure(["forward+backward", "forward", "qe"], options.exact_rounds, clock)
    results = {
        "forward+backward, ms": summary([1e3 * t / PERIOD for t in plain["forward+backward"]]),
        "kfac, ms": summary([1e3 * t / PERIOD for t in plain["kfac"]]),
    }
    for kind in ("so", "q"):
        ratios = [t / base for t, base in zip(plain[kind], plain["kfac"], strict=True)]
        results[f"{kind} over kfac"] = summary(ratios)
    ratios = [t / base for t, base in zip(exact["qe"], exact["forward+backward"], strict=True)]
    results["qe over forward+backward"] = summary(ratios)
    forward = [t / base for t, base in zip(exact["forward"], exact["forward+backward"], strict=True)]
    results["forward over forward+backward"] = summary(forward)
    print(f"torch {torch.__version__}, kronfac {kf.__version__}, {options.threads} threads, {PERIOD} steps a round")
    for name, found in results.items():
        print(f"{name}: {word(found)}")
    share = results["forward over forward+backward"]["median"]
    print(
        f"the paper's oracle cost of QE is N_IS + 1 = {N_INNER + 1}; with the outputs of {N_CAP} networks "
        f"{N_INNER + 1 + N_CAP * share:.2f} forward+backward"
    )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
