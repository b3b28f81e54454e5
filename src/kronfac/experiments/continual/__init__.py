"""Sequences of tasks, strategies against forgetting, and what they remember.

::

    from kronfac.experiments import continual

    results = continual.compare("permuted-digits", ["finetune", "ewc", "kfac"], tasks=3, out="runs/permuted")
    print(continual.summary(results))
"""

from __future__ import annotations

from kronfac.experiments.continual.compare import Results, compare, summary
from kronfac.experiments.continual.grid import Grid, search
from kronfac.experiments.continual.metrics import Metrics, metrics_of
from kronfac.experiments.continual.plans import Budget
from kronfac.experiments.continual.runner import Listener, Plan
from kronfac.experiments.continual.strategies import STRATEGIES, Strategy, get_strategy
from kronfac.experiments.continual.streams import STREAMS, Stream, Task, get_stream

__all__ = [
    "STRATEGIES",
    "STREAMS",
    "Budget",
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
]
