"""Cost of curvature in kronfac and its peers, over one forward and backward of the same model and batch.

    pip install curvlinops-for-pytorch singd asdfghjkl nngeometry backpack-for-pytorch kronfluence pytorch_optimizer
    python benchmarks/peers/cost.py [--workloads autoencoder,kfc,resnet20] [--rounds 7] [--libraries ours,...]
                                    [--out DIR]

Every round makes each call of each row once, in turn in one process, with the plain forward and backward before each
row. Extras are what a call takes beyond it, or, of a pass of its own, all it takes. Of whole steps each kind is timed
(with a refresh, without), and the mean over the row's period is reckoned from them. What a peer cannot do is told by
its own error; a library that is not installed is skipped.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import cost_peers
import cost_report
import torch
from cost_peers.base import BASE, PARTS, Cells, Gap, Part, Steps, failure

from kronfac.experiments.bench import NAMES, Spread, make

#: Rounds before those that count.
WARM_UP = 2


@dataclass
class Row:
    """One row of one workload, as it is measured.

    Attributes:
        library: The file it comes from.
        cells: What to call.
        bases: Seconds of forward and backward right before, by round.
        times: Seconds of each call by part, by round; of whole steps by part and kind.
    """

    library: str
    cells: Cells
    bases: list[float] = field(default_factory=list)
    times: dict[str, list[float]] = field(default_factory=dict)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(NAMES))
    parser.add_argument("--libraries", default=",".join(cost_peers.LIBRARIES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for cost.csv, cost.json and cost.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    libraries = options.libraries.split(",")
    if unknown := sorted(set(libraries) - set(cost_peers.LIBRARIES)):
        parser.error(f"--libraries: no {', '.join(unknown)}; known are {', '.join(cost_peers.LIBRARIES)}")
    results = {name: measure(name, libraries, options.rounds) for name in options.workloads.split(",")}
    versions = {cost_peers.LIBRARIES[library]: cost_peers.version(library) for library in libraries}
    cost_report.show(results, versions)
    if options.out:
        cost_report.write(options.out, results, versions, options.rounds)


def measure(name: str, libraries: list[str], rounds: int) -> dict:
    """Measure one workload.

    Args:
        name: The workload.
        libraries: Files of ``cost_peers``.
        rounds: How many rounds count.

    Returns:
        ``milliseconds`` of forward and backward, ``skipped`` libraries with the reason, and ``rows``: by row and part
        a dictionary with the ``spread`` of the extra and a ``note``, or with the ``reason`` why there is none.
    """
    plain = make(name)
    rows, skipped = build(name, libraries)
    for round_ in range(rounds + WARM_UP):
        for row in rows.values():
            base = seconds(plain.forward_backward)
            measured = once(row)
            if round_ >= WARM_UP:
                row.bases.append(base)
                for key, value in measured.items():
                    row.times.setdefault(key, []).append(value)
        print(f"{name}: round {round_ + 1} of {rounds + WARM_UP}", flush=True)
    bases = [base for row in rows.values() for base in row.bases]
    middle = statistics.median(bases)
    return {
        "milliseconds": Spread.of([1e3 * base for base in bases]).as_dict(),
        "skipped": skipped,
        "rows": {title: reckon(row, middle) for title, row in rows.items()},
    }


def build(name: str, libraries: list[str]) -> tuple[dict[str, Row], dict[str, str]]:
    """Make the rows of all libraries, each on a network of its own, and say which libraries are not there."""
    rows, skipped = {}, {}
    for library in libraries:
        found = cost_peers.load(library)
        if isinstance(found, str):
            skipped[cost_peers.LIBRARIES[library]] = found
            continue
        for title, cells in found.ROWS.items():
            try:
                rows[title] = Row(library, cells(make(name)))
            except Exception as error:  # whatever stops a peer is what the table says of it
                rows[title] = Row(library, dict.fromkeys(PARTS[:3], Gap(failure(error))))
    return rows, skipped


def once(row: Row) -> dict[str, float]:
    """Make each call of a row once; a call that fails becomes a gap."""
    times = {}
    for part, cell in row.cells.items():
        try:
            if isinstance(cell, Part):
                if cell.before is not None:
                    cell.before()
                times[part] = seconds(cell.function)
            elif isinstance(cell, Steps):
                for kind, (function, _) in cell.kinds.items():
                    times[f"{part}, {kind}"] = seconds(function)
        except Exception as error:
            row.cells[part] = Gap(failure(error))
    return times


def seconds(function) -> float:
    """Measure one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def reckon(row: Row, middle: float) -> dict:
    """Turn a row's seconds into extras over forward and backward.

    Args:
        row: The row.
        middle: The median of forward and backward over everything.

    Returns:
        Spread and note, or reason, by part.
    """
    result: dict[str, dict] = {}
    for part, cell in row.cells.items():
        if isinstance(cell, Gap):
            result[part] = {"reason": cell.reason}
            continue
        if isinstance(cell, Part):
            over = row.bases if cell.less == BASE else row.times.get(cell.less or "", [0.0] * len(row.bases))
            extras = [(t - o) / middle for t, o in zip(row.times[part], over, strict=True)]
        else:
            shares = {f"{part}, {kind}": share for kind, (_, share) in cell.kinds.items()}
            means = [sum(row.times[k][i] * share for k, share in shares.items()) for i in range(len(row.bases))]
            extras = [(t - b) / middle for t, b in zip(means, row.bases, strict=True)]
            if len(shares) > 1:
                for key in shares:
                    kind = [(t - b) / middle for t, b in zip(row.times[key], row.bases, strict=True)]
                    result[key] = {"spread": Spread.of(kind).as_dict(), "note": "one such step"}
        result[part] = {"spread": Spread.of(extras).as_dict(), "note": cell.note}
    return result


if __name__ == "__main__":
    main()
