"""Continual learning: quadratic penalties around earlier optima, and what goes with them."""

from __future__ import annotations

from kronfac.continual.avalanche import AvalanchePlugin
from kronfac.continual.balance import Balanced, GradientNorms, RunningMeans, balance
from kronfac.continual.base import Penalty, PenaltySum
from kronfac.continual.batchnorm import MergedBatchNorm, merge_batchnorm
from kronfac.continual.decay import RecentredDecay, recentred_decay
from kronfac.continual.files import load, save
from kronfac.continual.quadratic import QuadraticPenalty
from kronfac.continual.task_statistics import TaskStatistics

__all__ = [
    "AvalanchePlugin",
    "Balanced",
    "GradientNorms",
    "MergedBatchNorm",
    "Penalty",
    "PenaltySum",
    "QuadraticPenalty",
    "RecentredDecay",
    "RunningMeans",
    "TaskStatistics",
    "balance",
    "load",
    "merge_batchnorm",
    "recentred_decay",
    "save",
]
