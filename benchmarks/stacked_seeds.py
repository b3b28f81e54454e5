"""Does it pay to train several seeds at once? Forward+backward of S networks stacked, against S networks in turn.

    python benchmarks/stacked_seeds.py [--seeds 2,4] [--rounds 8] [--keep-memory]

The network and batch of `kronfac reproduce kld-wrm`, one thread. Stacked: `torch.func.vmap` of the gradient over
stacked parameters, each network with its own batch, as runs of different seeds need it. ``--keep-memory`` measures with
`kronfac.experiments.memory.keep_freed_memory`.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

from kronfac.experiments.memory import keep_freed_memory
from kronfac.experiments.models import puiu_network

BATCH = 512


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="2,4")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--keep-memory", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.keep_memory:
        keep_freed_memory()
    warnings.simplefilter("ignore")
    for seeds in map(int, options.seeds.split(",")):
        models = [puiu_network() for _ in range(seeds)]
        x, y = torch.randn(seeds, BATCH, 1, 28, 28), torch.randint(10, (seeds, BATCH))
        stacked, _buffers = stack_module_state(models)  # type: ignore[arg-type]
        base = models[0]

        def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor, base=base) -> torch.Tensor:
            return F.cross_entropy(functional_call(base, parameters, (x,)), y)

        def together(x=x, y=y, stacked=stacked, loss=loss) -> None:
            vmap(grad(loss), randomness="different")(stacked, x, y)

        def in_turn(models=models, x=x, y=y) -> None:
            for model, a, b in zip(models, x, y, strict=True):
                model.zero_grad()
                F.cross_entropy(model(a), b).backward()

        times: dict[str, list[float]] = {"together": [], "in turn": []}
        for number in range(options.rounds + 1):
            for name, function in (("in turn", in_turn), ("together", together)):
                start = time.perf_counter()
                function()
                if number:
                    times[name].append(time.perf_counter() - start)
        middle = {name: 1e3 * statistics.median(values) / seeds for name, values in times.items()}
        ratio = statistics.median(a / b for a, b in zip(times["together"], times["in turn"], strict=True))
        print(f"{seeds} seeds: ms for each network {middle}; together over in turn {ratio:.2f}")


if __name__ == "__main__":
    main()
