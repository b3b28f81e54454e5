"""What each part of KFAC costs, on fixed workloads with made-up data."""

from __future__ import annotations

from kronfac.experiments.bench.parts import PARTS, advances, chosen, measure
from kronfac.experiments.bench.run import Found, run
from kronfac.experiments.bench.timing import Spread
from kronfac.experiments.bench.workloads import LARGE, NAMES, PRECISIONS, Workload, check, check_name, make

__all__ = [
    "LARGE",
    "NAMES",
    "PARTS",
    "PRECISIONS",
    "Found",
    "Spread",
    "Workload",
    "advances",
    "check",
    "check_name",
    "chosen",
    "make",
    "measure",
    "run",
]
