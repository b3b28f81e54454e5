"""Peak memory of KFAC above SGD with momentum, in bytes of all Kronecker factors.

    python benchmarks/memory.py [--workloads autoencoder,kfc,resnet20] [--stats-forward own] [--json FILE]

Each optimiser trains in a process of its own for four steps, with statistics and inverses on each. Two peaks are read:
of the memory that tensors hold, from the allocator's events in the last step, and of the process as the system sees it,
which adds the workspaces of the libraries and what the C library's heap does not give back.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from kronfac.experiments.bench import NAMES, make
from kronfac.experiments.bench.roofline import factor_bytes
from kronfac.optim import KFAC


def child(name: str, kind: str, stats_forward: str) -> dict[str, int]:
    """Train in this process and report its peak, and the bytes of the factors."""
    torch.set_num_threads(2)
    work = make(name)
    parameters = work.model.parameters()
    optimizer: torch.optim.Optimizer
    factors = 0
    if kind == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)
    else:
        always: dict[str, Any] = {"stats_every": 1, "invert_every": 1, "stats_forward": stats_forward}
        optimizer = KFAC(work.model, work.likelihood, lr=0.0, damping=1.0, **always)
        factors = int(factor_bytes(optimizer))

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)  # no gradient is allocated within the step, so that both peaks compare
        work.loss(work.model(work.inputs), work.targets).backward()
        optimizer.step()

    for _ in range(4):
        step()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    held = sum(t.numel() * t.element_size() for t in owned(optimizer))
    return {"resident": resident, "tensors": held + allocated(step), "factors": factors}


def owned(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Tensors an optimiser keeps between steps."""
    kept = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    if isinstance(optimizer, KFAC):
        kept += [m.total for s in optimizer._estimator.statistics.values() for m in s.means().values()]
        kept += [t for inverse in optimizer._inverses.values() for t in inverse.tensors().values()]
    return kept


def allocated(step: Callable[[], None]) -> int:
    """Peak of what a step allocates beyond what was held before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()  # the allocator reports the release of what was allocated under its eyes only
        with torch.profiler.record_function("measured"):
            step()
    events = profile.profiler.kineto_results.events()
    start = next(e.start_ns() for e in events if e.name() == "measured")
    level = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        if event.start_ns() >= start:
            level += event.nbytes()
            peak = max(peak, level)
    return peak


def measure(name: str, stats_forward: str) -> dict[str, float]:
    """Peaks above those of SGD for one workload."""
    found = {}
    for kind in ("sgd", "kfac"):
        command = [sys.executable, __file__, "--child", name, kind, stats_forward]
        found[kind] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    factors = found["kfac"]["factors"]
    extra = {key: found["kfac"][key] - found["sgd"][key] for key in ("tensors", "resident")}
    return {"factors": factors, "tensors": extra["tensors"], "resident": extra["resident"]}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(NAMES))
    parser.add_argument("--stats-forward", default="shared", choices=("shared", "own"))
    parser.add_argument("--json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*options.child)))
        return
    results = {name: measure(name, options.stats_forward) for name in options.workloads.split(",")}
    print("| above SGD with momentum | factors, MB | tensors, MB | over factors | process, MB | over factors |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, r in results.items():
        f, t, p = (r[key] for key in ("factors", "tensors", "resident"))
        print(f"| {name} | {f / 1e6:.1f} | {t / 1e6:.1f} | {t / f:.2f} | {p / 1e6:.1f} | {p / f:.2f} |")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
