"""MKL or oneDNN: time and error of products of float32 matrices on this processor.

    python benchmarks/cpu_products.py [--threads 2] [--rounds 30]

Products of the deep autoencoder's and of the KFC network's layers with their inverses, and second moments, of which the
upper triangle is wanted. `kronfac.linalg.products` takes oneDNN where the last line says so; the other columns are what
that is worth. Errors are of the norm, to the product in float64.

Then forward and backward of the autoencoder, by PyTorch's default and where it may take oneDNN, which
`torch.backends.mkldnn.matmul.fp32_precision = "bf16"` permits: by float32 on processors without AMX, and the gradients'
difference tells.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kronfac.experiments.bench.timing import clock_of, timed
from kronfac.experiments.bench.workloads import make
from kronfac.linalg import products, symmetric

#: Heights, sums and widths of products, and rows and widths of second moments.
SHAPES = ((1000, 1000, 785), (500, 1000, 1000), (250, 250, 501), (64, 64, 801), (64, 801, 801))
MOMENTS = ((500, 250), (500, 500), (500, 784), (500, 1000), (8192, 256), (20000, 577))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    taken = products.outruns_mkl()
    print(f"{'':28} {'MKL, ms':>9} {'oneDNN, ms':>11} {'ratio':>6} {'error of MKL':>13} {'of oneDNN':>10}")
    with torch.no_grad():
        for m, k, n in SHAPES:
            left, right = torch.randn(m, k), torch.randn(k, n)
            product = partial(products.matmul, left, right)
            compare(f"{m} x {k} x {n}", product, left.double() @ right.double(), options.rounds)
        for rows, width in MOMENTS:
            x = torch.randn(rows, width)
            total = torch.empty(width, width)
            wanted = (x.double().mT @ x.double()).triu()
            compare(f"moment of {rows} x {width}", partial(moment, total, x), wanted, options.rounds)
    print(f"taken here: {'oneDNN' if taken else 'MKL'}")
    training(options.rounds)


def training(rounds: int) -> None:
    """Print forward and backward, by default and with oneDNN permitted, in turn."""
    work, settings = make("autoencoder"), torch.backends.mkldnn.matmul
    before, times, gradients = settings.fp32_precision, {}, {}
    for number in range(rounds + 3):
        for choice in (before, "bf16"):
            settings.fp32_precision = choice
            seconds = timed(work.forward_backward, clock_of("cpu"))
            if number >= 3:
                times.setdefault(choice, []).append(1e3 * seconds)
            gradients[choice] = torch.cat([p.grad.flatten() for p in work.model.parameters() if p.grad is not None])
    settings.fp32_precision = before
    plain, permitted = (statistics.median(times[choice]) for choice in (before, "bf16"))
    apart = (gradients["bf16"] - gradients[before]).norm() / gradients[before].norm()
    print(f"forward and backward: {plain:.1f} ms; oneDNN permitted: {permitted:.1f} ms, gradients {apart:.1e} apart")


def moment(total: Tensor, rows: Tensor) -> Tensor:
    """Upper triangle of a second moment."""
    return symmetric.add_gram_(total.zero_(), rows).triu_()


def compare(name: str, function: Callable[[], Tensor], wanted: Tensor, rounds: int) -> None:
    """Print a line: the function with either library, in turn."""
    times: dict[bool, list[float]] = {False: [], True: []}
    errors: dict[bool, float] = {}
    for number in range(rounds + 3):
        for choice, seconds in times.items():
            for module in (products, symmetric):
                module.outruns_mkl = lambda choice=choice: choice  # type: ignore[attr-defined, misc]
            took = timed(function, clock_of("cpu"))
            if number >= 3:
                seconds.append(took)
            errors[choice] = float(function().double().sub(wanted).norm() / wanted.norm())
    mkl, onednn = (1e3 * statistics.median(times[choice]) for choice in (False, True))
    print(f"{name:28} {mkl:9.3f} {onednn:11.3f} {onednn / mkl:6.2f} {errors[False]:13.1e} {errors[True]:10.1e}")


if __name__ == "__main__":
    main()
