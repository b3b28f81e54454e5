"""Sequences of tasks, strategies against forgetting, and what they remember.

::

    from kronfac.experiments import continual

    results = continual.compare("permuted-digits", ["finetune", "ewc", "kfac"], tasks=3, out="runs/permuted")
    print(continual.summary(results))
"""

from __future__ import annotations

from kronfac.experiments.continual.compare import compare
from kronfac.experiments.continual.grid import search
from kronfac.experiments.continual.metrics import Metrics, metrics_of
from kronfac.experiments.continual.plans import Budget
from kronfac.experiments.continual.points import Grid
from kronfac.experiments.continual.report import write_report
from kronfac.experiments.continual.results import Failure, Results
from kronfac.experiments.continual.runner import Listener, Plan
from kronfac.experiments.continual.strategies import STRATEGIES, Strategy, get_strategy
from kronfac.experiments.continual.streams import STREAMS, Stream, get_stream
from kronfac.experiments.continual.tables import summary
from kronfac.experiments.continual.tasks import Task

__all__ = [
    "STRATEGIES",
    "STREAMS",
    "Budget",
    "Failure",
    "Grid",
    "Listener",
    "Metrics",
    "Plan",
    "Results",
    "Strategy",
    "Stream",
    "Task",
    "compare",
    "get_strategy",
    "get_stream",
    "metrics_of",
    "search",
    "summary",
    "write_report",
]
