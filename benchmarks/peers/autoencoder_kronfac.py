"""``AdaptiveKFAC`` from FOLDER/start.npz, nothing set by hand; writes FOLDER/kronfac.jsonl.

python benchmarks/peers/autoencoder_kronfac.py FOLDER [--threads 2] [--set name=value]
"""

from __future__ import annotations

import argparse
import ast
import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import kronfac as kf


def main() -> None:
    """Train, and write a line for each step: loss and squared error of the batch before it, and its seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--out", default="kronfac.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = np.load(options.folder / "start.npz")
    images = torch.from_numpy(start["images"]).float() / 255
    count = sum(name.startswith("weight") for name in start.files)
    layers: list[nn.Module] = []
    for i in range(count):
        weight = torch.from_numpy(start[f"weight{i}"])
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": torch.from_numpy(start[f"bias{i}"])})
        layers += [layer] if i in {count // 2 - 1, count - 1} else [layer, nn.Sigmoid()]
    model = nn.Sequential(*layers)
    settings = {k: ast.literal_eval(v) for k, v in (pair.split("=", 1) for pair in options.set)}
    optimizer = kf.optim.AdaptiveKFAC(model, kf.Bernoulli(reduction="batchmean"), weight_decay=1e-5, **settings)
    edges = [0, *np.cumsum(start["sizes"]).tolist()]
    with open(options.folder / options.out, "w") as file:
        for step, (a, b) in enumerate(pairwise(edges)):
            x = images[torch.from_numpy(start["order"][a:b])]
            begin = time.perf_counter()
            loss = optimizer.step(
                lambda x=x: F.binary_cross_entropy_with_logits(model(x), x, reduction="sum") / len(x)  # type: ignore[misc]
            )
            seconds = time.perf_counter() - begin
            record = {"step": step, "loss": loss, "seconds": seconds, "batch": len(x)}
            if step % 20 == 19 or step == 0:
                record["squared_error"] = squared_error(model, images)
            report = optimizer.report
            assert report is not None
            record |= {"lam": report.lam, "gamma": report.gamma, "alpha": report.alpha, "mu": report.mu}
            file.write(json.dumps(record) + "\n")
            file.flush()


@torch.no_grad()
def squared_error(model: nn.Module, images: torch.Tensor) -> float:
    """Squared error for each image of the training set."""
    total = sum(float((model(x).sigmoid() - x).square().sum()) for x in images.split(5000))
    return total / len(images)


if __name__ == "__main__":
    main()
