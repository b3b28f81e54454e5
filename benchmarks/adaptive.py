"""Cost of a step of ``AdaptiveKFAC`` over one of ``KFAC`` with the same periods, measured side by side in one run.

    python benchmarks/adaptive.py [--rounds 10] [--threads 2] [--batch 500]

The autoencoder 784-1000-500-250-30 with a batch of its own at each step; statistics each step, inverses every 20, ``λ``
adapted every 5 and ``γ`` every 20 steps. A round is 20 steps of each in turn; medians with quartiles. With
``--stats-every`` both gather less often.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import kronfac as kf
from kronfac.experiments.models import autoencoder

STEPS = 20
LIKELIHOOD = kf.Bernoulli(reduction="batchmean")


def loss_of(model: torch.nn.Module, x: Tensor) -> Tensor:
    """Cross-entropy summed over pixels, averaged over images."""
    return F.binary_cross_entropy_with_logits(model(x), x, reduction="sum") / len(x)


def runs(batches: list[Tensor], stats_every: int) -> dict[str, Callable[[Tensor], object]]:
    """One step of each kind on a batch."""
    models = [autoencoder((784, 1000, 500, 250, 30)) for _ in range(3)]
    kfac = kf.optim.KFAC(
        models[1], LIKELIHOOD, 0.01, damping=1.0, stats_every=stats_every, invert_every=20, burn_in=0, kl_clip=None
    )
    adaptive = kf.optim.AdaptiveKFAC(models[2], LIKELIHOOD, stats_every=stats_every, invert_every=20)

    def plain(x: Tensor) -> None:
        models[0].zero_grad()
        loss_of(models[0], x).backward()

    def fixed(x: Tensor) -> None:
        kfac.zero_grad()
        loss_of(models[1], x).backward()
        kfac.step()

    def tuned(x: Tensor) -> None:
        adaptive.step(lambda: loss_of(models[2], x))

    for step in range(2 * STEPS):  # past the calibration and the geometric start
        fixed(batches[step % len(batches)])
        tuned(batches[step % len(batches)])
    return {"forward+backward": plain, "KFAC": fixed, "AdaptiveKFAC": tuned}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--stats-every", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    batches = [torch.rand(options.batch, 784) for _ in range(STEPS)]
    functions = runs(batches, options.stats_every)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(options.rounds):
        for name, function in functions.items():
            begin = time.perf_counter()
            for x in batches:
                function(x)
            seconds[name].append((time.perf_counter() - begin) / STEPS)
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
        print(f"{name}: {1e3 * middle:.1f} ms ({1e3 * low:.1f} to {1e3 * high:.1f})")
    ratios = [a / b for a, b in zip(seconds["AdaptiveKFAC"], seconds["KFAC"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    print(f"AdaptiveKFAC over KFAC: {middle:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
