"""What each part of KFAC costs, on fixed workloads with made-up data."""

from __future__ import annotations

from kronfac.experiments.bench.families import FAMILIES, Family, get_family
from kronfac.experiments.bench.parts import PARTS, advances, chosen, measure
from kronfac.experiments.bench.run import Found, run
from kronfac.experiments.bench.scaling import Limits, Point, of_parts, planned, scale
from kronfac.experiments.bench.timing import Spread
from kronfac.experiments.bench.workloads import LARGE, NAMES, PRECISIONS, Workload, check, check_name, make

__all__ = [
    "FAMILIES",
    "LARGE",
    "NAMES",
    "PARTS",
    "PRECISIONS",
    "Family",
    "Found",
    "Limits",
    "Point",
    "Spread",
    "Workload",
    "advances",
    "check",
    "check_name",
    "chosen",
    "get_family",
    "make",
    "measure",
    "of_parts",
    "planned",
    "run",
    "scale",
]
