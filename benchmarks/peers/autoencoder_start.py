"""What both sides of the comparison with kfac-jax start from: data, initial weights and the order of the batches.

    python benchmarks/peers/autoencoder_start.py FOLDER [--problem mnist-logistic] [--steps 300] [--batch 1000] [--grow]

Writes FOLDER/start.npz, which needs numpy alone to read.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from torch import nn

from kronfac.experiments.problems import get_problem
from kronfac.optim import GrowingBatches


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--problem", default="mnist-logistic")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--grow", action="store_true", help="let batches grow to the whole set at step 500")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    problem = get_problem(options.problem)
    data, model = problem.data(), problem.model(options.seed)
    full_at = 500 if options.grow else 10**9
    batches = GrowingBatches(len(data.train_inputs), options.steps, start=options.batch, full_at=full_at)
    lists = list(batches)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    arrays = {f"weight{i}": layer.weight.detach().numpy() for i, layer in enumerate(layers)}
    arrays |= {f"bias{i}": layer.bias.detach().numpy() for i, layer in enumerate(layers)}
    options.folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        options.folder / "start.npz",
        images=(data.train_inputs * 255).round().byte().numpy(),
        order=np.concatenate([np.asarray(batch) for batch in lists]),
        sizes=np.asarray([len(batch) for batch in lists]),
        **arrays,
    )


if __name__ == "__main__":
    main()
