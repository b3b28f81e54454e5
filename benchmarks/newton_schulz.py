"""Inverses by Newton-Schulz from those of the refresh before, beside Cholesky's: iterations, fallbacks and time.

    python benchmarks/newton_schulz.py [--factors FILE] [--seconds 200] [--damping 0.1,0.01,0.001] [--threads 1]
        [--device cuda]

The autoencoder 784-1000-500-250-30 and back on MNIST, trained by KFAC as `kronfac compare mnist-autoencoder` has it
(statistics every 10 steps, their average with decay 0.95). From step 60 on its sixteen factors are kept every 10 steps,
up to step 160. *Every 10 steps*: ten refreshes, each from the inverses of the one before. *Every 100*: one refresh, at
step 160 from the inverses of step 60. The damping is split over the factors by their traces; it is that of the
inverses timed here, while the network was trained with its own, 0.3. *Largest condition* is at step 160, *iterations*
the mean over factors that took no fallback.

A refresh inverts the sixteen factors; the two methods take turns, and each ratio is of two neighbours. ``--factors``
keeps training and factors in a file, and goes on from there after ``--seconds`` of training.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kronfac.blocks import Kronecker, PerFactor
from kronfac.damping import factored
from kronfac.experiments.bench.timing import Clock, clock_of
from kronfac.experiments.problems import get_problem
from kronfac.linalg.inverse import invert
from kronfac.linalg.newton_schulz import renew
from kronfac.optim import KFAC

FIRST, LAST, EVERY = 60, 160, 10
Factors = dict[str, tuple[Tensor, Tensor]]


def collect(path: Path | None, seconds: float, device: str) -> dict[int, Factors] | None:
    """Train, and keep the factors by step; None where there was no time for all of them."""
    problem = get_problem("mnist-autoencoder")
    model, data = problem.model(0).to(device), problem.data()
    optimizer = KFAC(model, problem.likelihood(), **problem.tuned["kfac"])
    saved: dict[str, Any] = {"step": 0, "factors": {}}
    if path is not None and path.exists():
        saved = torch.load(path, weights_only=True, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    begun = time.perf_counter()
    while saved["step"] <= LAST and time.perf_counter() - begun < seconds:
        step = saved["step"]
        chosen = torch.randint(len(data.train_inputs), (500,), generator=torch.Generator().manual_seed(step))
        images = data.train_inputs[chosen].to(device)
        optimizer.zero_grad()
        problem.loss(model(images), images).backward()
        optimizer.step()
        if step >= FIRST and step % EVERY == 0:
            blocks = optimizer.curvature().blocks.items()
            saved["factors"][step] = {n: (b.input.clone(), b.output.clone()) for n, b in blocks}  # type: ignore[attr-defined]
        saved["step"] += 1
    if path is not None:
        torch.save({**saved, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return saved["factors"] if saved["step"] > LAST else None


def damped(factors: Factors, damping: float) -> tuple[list[Tensor], list[Tensor | float]]:
    """All factors, and what is added to each."""
    matrices: list[Tensor] = []
    shifts: list[Tensor | float] = []
    for input, output in factors.values():
        shift = factored(Kronecker(input, output), damping)
        assert isinstance(shift, PerFactor)
        matrices += [input, output]
        shifts += [shift.input, shift.output]
    return matrices, shifts


def quartiles(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _condition(matrix: Tensor) -> float:
    values = torch.linalg.eigvalsh(matrix)
    return float(values[-1] / values[0])


def row(found: dict[int, Factors], damping: float, every: int, rounds: int, clock: Clock) -> str:
    """Refresh again and again, in turn with Cholesky."""
    ratios, cold, taken, fallbacks = [], [], [], 0
    steps = range(LAST - (LAST - FIRST) // every * every, LAST + 1, every)
    starts: list[Tensor] = []
    for step in steps:
        matrices, shifts = damped(found[step], damping)
        for _ in range(1 if not starts else rounds):
            begun = clock()
            invert(matrices, shifts)
            middle = clock()
            renewed = renew(matrices, shifts, starts or [None] * len(matrices))
            if starts:
                cold.append(middle - begun)
                ratios.append((clock() - middle) / (middle - begun))
        if starts:
            taken += [result.iterations for result in renewed if not result.fallback]
            fallbacks += sum(result.fallback for result in renewed)
        starts = [result.inverse for result in renewed]
    count, condition = len(taken) + fallbacks, max(_condition(inverse) for inverse in starts)
    return (
        f"| {damping:g} | {every} | {condition:.0e} | {sum(taken) / max(len(taken), 1):.2f} | "
        f"{fallbacks} of {count} | {quartiles([1e3 * value for value in cold])} | {quartiles(ratios)} |"
    )


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--damping", default="0.1,0.01,0.001")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = collect(options.factors, options.seconds, options.device)
    if found is None:
        print("Out of time: the same command goes on." if options.factors else "Out of time.")
        return
    print("| damping | refresh every | largest condition | iterations | fallbacks | Cholesky, ms | over Cholesky |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for damping in map(float, options.damping.split(",")):
        for every, rounds in ((10, 1), (100, 3)):
            print(row(found, damping, every, rounds, clock_of(options.device)), flush=True)


if __name__ == "__main__":
    main()
