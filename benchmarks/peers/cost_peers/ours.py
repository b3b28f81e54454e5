"""Rows of kronfac."""

from __future__ import annotations

from collections.abc import Callable

from cost_peers.base import BASE, Cells, Everything, Part, Rows, Steps, training_step
from kronfac.experiments.bench import Workload, make
from kronfac.experiments.bench.parts import BOUNDED, parts
from kronfac.optim import KFAC


def cells(work: Workload) -> Cells:
    """Cells of KFAC with its own periods."""
    calls = parts(work, BOUNDED)
    return {
        "statistics": Part(calls["with statistics"], less=BASE, note="sampled labels, one a term"),
        "inverse": Part(calls["inverse"]),
        "precondition": Part(calls["precondition"]),
        "step": steps(work.name, 10, 100),
    }


def as_often_as_others(work: Workload) -> Cells:
    """A whole step with the period that SOAP and singd have."""
    return {"step": steps(work.name, 10, 10)}


def steps(name: str, statistics_every: int, invert_every: int) -> Steps:
    """Take steps of each kind with an optimiser that is past its geometric start.

    Args:
        name: The workload, made anew since the parts have their hooks on the other one.
        statistics_every: Period of the statistics.
        invert_every: Period of the inverses.

    Returns:
        The kinds and their shares.
    """
    work = make(name)
    optimizer = KFAC(work.model, work.likelihood, lr=0.0, damping=1.0, burn_in=0, stats_every=10, invert_every=100)
    one = training_step(work, optimizer)
    one()

    def at(step: int) -> None:
        optimizer._steps = step  # the step's place in the period decides what is due
        one()

    kinds = {
        "inverse": (lambda: at(200), 1 / invert_every),
        "statistics": (lambda: at(210), 1 / statistics_every - 1 / invert_every),
        "plain": (lambda: at(211), 1 - 1 / statistics_every),
    }
    return Steps(kinds, f"statistics every {statistics_every}, inverses every {invert_every} steps, default clip")


def everything(work: Workload) -> Callable[[], None]:
    """Steps with statistics and inverses on each."""
    return training_step(
        work, KFAC(work.model, work.likelihood, lr=0.0, damping=1.0, burn_in=0, stats_every=1, invert_every=1)
    )


ROWS: Rows = {"kronfac KFAC": cells, "kronfac KFAC, inverses every 10": as_often_as_others}
EVERYTHING: Everything = {"kronfac KFAC": everything}
