"""What each part of KFAC costs, on fixed workloads with made-up data."""

from __future__ import annotations

from kronfac.experiments.bench.parts import Spread, advances, measure
from kronfac.experiments.bench.workloads import NAMES, Workload, make

__all__ = ["NAMES", "Spread", "Workload", "advances", "make", "measure"]
