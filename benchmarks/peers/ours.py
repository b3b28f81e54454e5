"""An optimiser of ours, or a first-order one, from FOLDER/start.npz; writes a line for each step to FOLDER/NAME.jsonl.

    python benchmarks/peers/ours.py FOLDER                                    # AdaptiveKFAC, nothing set by hand
    python benchmarks/peers/ours.py FOLDER --optimizer sgd --lr 0.01 --seconds 60 [--batch 250]

First-order optimisers draw batches of their own size from the whole set for a time that is given, since the batches
that serve second-order methods are not theirs.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

import kronfac as kf
from kronfac.experiments.problems import Problem, get_problem
from kronfac.experiments.problems.base import Data

#: Steps between two evaluations of second-order methods, and seconds of training between those of first-order ones.
EVERY, SECONDS = 20, 3.0


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--optimizer", choices=("adaptive_kfac", "sgd", "adamw"), default="adaptive_kfac")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=10**9, help="end after so many steps, for grids on a busy machine")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--out", help="name of the file; that of the optimiser by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = np.load(options.folder / "start.npz")
    problem = get_problem(str(start["problem"]))
    data = problem.data()
    settings = {k: ast.literal_eval(v) for k, v in (pair.split("=", 1) for pair in options.set)}
    with open(options.folder / f"{options.out or options.optimizer}.jsonl", "w") as file:
        if options.optimizer == "adaptive_kfac":
            records = second_order(problem, data, start, settings)
        else:
            records = first_order(problem, data, options)
        for record in records:
            file.write(json.dumps(record) + "\n")
            file.flush()


def second_order(
    problem: Problem, data: Data, start: dict[str, np.ndarray], settings: dict[str, object]
) -> Iterator[dict]:
    """Take ``AdaptiveKFAC``'s steps on the batches of the file."""
    model = problem.model(int(start["seed"]))
    for name, parameter in model.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), start[name]), "FOLDER/start.npz is of another version"
    optimizer = kf.optim.AdaptiveKFAC(model, problem.likelihood(), weight_decay=1e-5, **settings)  # type: ignore[arg-type]
    edges = [0, *np.cumsum(start["sizes"]).tolist()]
    order = torch.from_numpy(start["order"])
    for step, (a, b) in enumerate(pairwise(edges)):
        x, y = data.train_inputs[order[a:b]], data.train_targets[order[a:b]]
        begin = time.perf_counter()
        loss = optimizer.step(lambda x=x, y=y: problem.loss(model(x), y))
        record = {"step": step + 1, "loss": loss, "seconds": time.perf_counter() - begin, "batch": len(x)}
        if step % EVERY == EVERY - 1 or step == 0:
            record |= problem.evaluate(model, data)
        report = optimizer.report
        assert report is not None
        yield record | {"lam": report.lam, "gamma": report.gamma, "alpha": report.alpha, "mu": report.mu}


def first_order(problem: Problem, data: Data, options: argparse.Namespace) -> Iterator[dict]:
    """Take SGD's or AdamW's steps for some seconds."""
    model = problem.model(0)
    if options.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), options.lr, momentum=0.9, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), options.lr)
    generator = torch.Generator().manual_seed(0)
    total, due, step = 0.0, 0.0, 0
    while total < options.seconds:
        for chosen in torch.randperm(len(data.train_inputs), generator=generator).split(options.batch):
            x, y = data.train_inputs[chosen], data.train_targets[chosen]
            begin = time.perf_counter()
            optimizer.zero_grad()
            loss = problem.loss(model(x), y)
            loss.backward()
            optimizer.step()
            seconds = time.perf_counter() - begin
            total, step = total + seconds, step + 1
            record = {"step": step, "loss": float(loss.detach()), "seconds": seconds, "batch": len(x)}
            ends = total >= options.seconds or step == options.steps or not math.isfinite(record["loss"])
            if (total >= due and options.steps == 10**9) or ends:
                record |= problem.evaluate(model, data)
                due = total + SECONDS
            yield record
            if ends:
                return


if __name__ == "__main__":
    main()
