"""Experiments: problems, runs that survive a kill, comparisons of optimisers, and their reports.

What ``kronfac`` on the command line does can be done from Python::

    from kronfac import experiments

    results = experiments.compare("digits-autoencoder", ["sgd", "adam", "kfac"], steps=500, out="runs/digits")
    print(experiments.summary(results))

Needs ``pip install 'kronfac[experiments]'``; nothing of it is imported before it is used.
"""

from __future__ import annotations

from kronfac.experiments.compare import compare
from kronfac.experiments.errors import CheckpointError, DatasetError, ExperimentError
from kronfac.experiments.optimizers import OPTIMIZERS
from kronfac.experiments.problems import PROBLEMS, Problem, get_problem
from kronfac.experiments.report import write_report
from kronfac.experiments.results import Results, read_results
from kronfac.experiments.search import Range, Search, read_axis
from kronfac.experiments.tables import curves, headlines, reaches, summary
from kronfac.experiments.targets import targets

__all__ = [
    "OPTIMIZERS",
    "PROBLEMS",
    "CheckpointError",
    "DatasetError",
    "ExperimentError",
    "Problem",
    "Range",
    "Results",
    "Search",
    "compare",
    "curves",
    "get_problem",
    "headlines",
    "reaches",
    "read_axis",
    "read_results",
    "summary",
    "targets",
    "write_report",
]
