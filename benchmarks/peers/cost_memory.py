"""Peak memory of kronfac and its peers above SGD with momentum, of the process as the system sees it.

    python benchmarks/peers/cost_memory.py [--workloads autoencoder,kfc,resnet20] [--json FILE]

A process for each row: SGD with momentum trains first, then the row does everything it can, with a refresh each time;
its peak is how far the process has grown beyond SGD's. Optimisers hold their momentum, curvature alone one gradient.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import warnings

import cost_peers
import torch
from cost_peers.base import failure, training_step
from cost_report import HEADS

from kronfac.experiments.bench import NAMES, make

#: Steps of SGD, and calls of a row.
CALLS = 3


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(NAMES))
    parser.add_argument("--libraries", default=",".join(cost_peers.LIBRARIES))
    parser.add_argument("--json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*options.child)))
        return
    warnings.simplefilter("ignore")
    workloads, results = options.workloads.split(","), {}
    print(f"| MB above SGD with momentum | {' | '.join(HEADS.get(w, w) for w in workloads)} |")
    print("| --- |" + " --- |" * len(workloads))
    for library in options.libraries.split(","):
        module = cost_peers.load(library)
        if isinstance(module, str):
            print(f"skipped: {library}: {module}", file=sys.stderr)
            continue
        for title in module.EVERYTHING:
            results[title] = {workload: measure(workload, library, title) for workload in workloads}
            cells = (f"{r['bytes'] / 1e6:.0f}" if "bytes" in r else "–" for r in results[title].values())
            print(f"| {title} | {' | '.join(cells)} |", flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


def measure(workload: str, library: str, title: str) -> dict[str, object]:
    """Start a process and read what it found."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", workload, library, title]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"reason": f"the process ended with {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def child(workload: str, library: str, title: str) -> dict[str, object]:
    """Train with SGD, then run the row, and return its bytes above SGD's peak or why it failed."""
    torch.set_num_threads(2)
    module = cost_peers.load(library)
    work = make(workload)
    sgd = torch.optim.SGD(work.model.parameters(), lr=0.0, momentum=0.9)
    step = training_step(work, sgd)
    for _ in range(CALLS):
        step()
    before = peak()
    del sgd, step
    try:
        one = module.EVERYTHING[title](work)
        for _ in range(CALLS):
            one()
    except Exception as error:  # whatever stops a peer is what is told of it
        return {"reason": failure(error)}
    return {"bytes": peak() - before}


def peak() -> int:
    """Return the process's peak in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
