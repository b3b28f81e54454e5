"""Rows of torch's own first-order optimisers."""

from __future__ import annotations

import torch

from cost_peers.base import Cells, Everything, Rows, Steps, training_step
from kronfac.experiments.bench import Workload


def sgd(work: Workload) -> Cells:
    """SGD with momentum."""
    return cells(work, torch.optim.SGD(work.model.parameters(), lr=0.0, momentum=0.9))


def adamw(work: Workload) -> Cells:
    """AdamW."""
    return cells(work, torch.optim.AdamW(work.model.parameters(), lr=0.0))


def cells(work: Workload, optimizer: torch.optim.Optimizer) -> Cells:
    """A step is all there is."""
    return {"step": Steps({"plain": (training_step(work, optimizer), 1.0)})}


ROWS: Rows = {"SGD with momentum": sgd, "AdamW": adamw}
EVERYTHING: Everything = {}
