"""Rows of pytorch_optimizer: SOAP, Shampoo and Muon."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pytorch_optimizer import SOAP, Muon, Shampoo

from cost_peers.base import Everything, Rows, Steps, alternating, matrices, training_step
from kronfac.experiments.bench import Workload


def soap(work: Workload, every: int = 2) -> Callable[[], None]:
    """Make a step of SOAP: the first starts its bases, the second is plain, the third refreshes."""
    return training_step(work, SOAP(work.model.parameters(), lr=0.0, precondition_frequency=every))


def shampoo(work: Workload, every: int = 2) -> Callable[[], None]:
    """Make a function that takes a step of Shampoo."""
    return training_step(
        work, Shampoo(work.model.parameters(), lr=0.0, momentum=0.9, preconditioning_compute_steps=every)
    )


def muon(work: Workload) -> Callable[[], None]:
    """Make a function that takes a step of Muon on all matrices but the last layer's and of AdamW on the rest."""
    hidden = [layer.weight for layer in matrices(work.model)[:-1]]
    chosen = {id(p) for p in hidden}
    rest = [p for p in work.model.parameters() if id(p) not in chosen]
    groups = [{"params": hidden, "lr": 0.0, "use_muon": True}, {"params": rest, "lr": 0.0, "use_muon": False}]
    return training_step(work, Muon(groups))


ROWS: Rows = {
    "SOAP": lambda work: {"step": alternating(soap(work), "refresh", 10, "bases every 10 steps, its default")},
    "Shampoo": lambda work: {
        "step": alternating(shampoo(work), "plain", 10, "roots every 10 steps (its default is 1)")
    },
    "Muon": lambda work: {"step": Steps({"plain": (muon(work), 1.0)}, "orthogonalised at every step")},
}
EVERYTHING: Everything = {"SOAP": partial(soap, every=1), "Shampoo": partial(shampoo, every=1), "Muon": muon}
