"""What all sides of a comparison start from: data, initial weights and the order of the batches.

    python benchmarks/peers/start.py FOLDER [--problem mnist-logistic] [--steps 150] [--batch 1000] [--grow]

Writes FOLDER/start.npz, which needs numpy alone to read; ``layers`` in it is the network as JSON.
"""

from __future__ import annotations

import argparse
import json
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
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--grow", action="store_true", help="let batches grow to the whole set at step 500")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    problem = get_problem(options.problem)
    data, model = problem.data(), problem.model(options.seed)
    full_at = 500 if options.grow else 10**9
    batches = GrowingBatches(len(data.train_inputs), options.steps, start=options.batch, full_at=full_at)
    lists = list(batches)
    arrays = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    if data.train_targets is not data.train_inputs:
        arrays["targets"] = data.train_targets.numpy()
    options.folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        options.folder / "start.npz",
        problem=problem.name,
        seed=options.seed,
        likelihood=type(problem.likelihood()).__name__,
        layers=json.dumps([describe(name, layer) for name, layer in model.named_children()]),
        evaluated=problem.evaluation_examples or len(data.train_inputs),
        inputs=data.train_inputs.numpy(),
        order=np.concatenate([np.asarray(batch) for batch in lists]),
        sizes=np.asarray([len(batch) for batch in lists]),
        **arrays,
    )


def describe(name: str, layer: nn.Module) -> dict[str, object]:
    """Describe one layer of a sequential network.

    Args:
        name: Its name.
        layer: The layer.

    Returns:
        What ``kfac_jax_side.py`` rebuilds it from.

    Raises:
        SystemExit: It is of a kind that no other side knows.
    """
    kind = type(layer).__name__
    if isinstance(layer, nn.Conv2d):
        assert isinstance(layer.padding, tuple)
        return {"kind": kind, "name": name, "padding": layer.padding[0]}
    if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
        return {"kind": kind, "size": layer.kernel_size, "stride": layer.stride, "overhang": layer.ceil_mode}
    if isinstance(layer, nn.Linear | nn.Sigmoid | nn.ReLU | nn.Flatten):
        return {"kind": kind, "name": name}
    raise SystemExit(f"layer {name!r} is a {kind}, which the other sides do not know")


if __name__ == "__main__":
    main()
