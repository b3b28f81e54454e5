"""The rows of SINGD: structured inverse-free natural gradient descent."""

from __future__ import annotations

from collections.abc import Callable

from singd.optim.optimizer import SINGD

from cost_peers.base import BASE, Cells, Everything, Gap, Part, Rows, alternating, training_step
from kronfac.experiments.bench import Workload, make


def dense(work: Workload) -> Cells:
    """Dense factors, its default."""
    return cells(work, "dense")


def diagonal(work: Workload) -> Cells:
    """Diagonal factors, the cheapest of its structures."""
    return cells(work, "diagonal")


def cells(work: Workload, structure: str) -> Cells:
    """Cells; it trains linear and convolutional layers alone, batch norm is left where it is."""
    settings = {"lr": 0.0, "damping": 1.0, "structures": (structure, structure), "warn_unsupported": False}
    optimizer = SINGD(work.model, T=1, **settings)
    other = make(work.name)
    one = training_step(other, SINGD(other.model, T=2, **settings))

    def forget() -> None:  # what is gathered adds up until a step uses it
        optimizer.H_Ks.clear()
        optimizer.H_Cs.clear()

    return {
        "statistics": Part(work.forward_backward, less=BASE, before=forget, note="empirical Fisher, no sampled labels"),
        "inverse": Gap("inverse-free: its factors move within step()"),
        "precondition": Gap("within step() only"),
        "step": alternating(one, "refresh", 10, "statistics and factors every 10 steps, its default"),
    }


def everything(work: Workload) -> Callable[[], None]:
    """Steps with a refresh on each."""
    return training_step(work, SINGD(work.model, T=1, lr=0.0, damping=1.0, warn_unsupported=False))


ROWS: Rows = {"SINGD, dense": dense, "SINGD, diagonal": diagonal}
EVERYTHING: Everything = {"SINGD, dense": everything}
