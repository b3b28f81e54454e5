"""What processes of a distributed run tell each other of layers that only some of them call, such as experts."""

from __future__ import annotations

from typing import Any

from kronfac.estimator import Estimator
from kronfac.optim.gathering import Gatherer
from kronfac.optim.options import several_processes


def agree(estimator: Estimator, gatherer: Gatherer) -> set[str]:
    """Let all processes know of the layers that any of them has statistics of, since sums are over all of them.

    Where others called a layer and this process did not, its terms of the loss count for it: they are part of the same
    loss, and their gradients are zero.  And the outputs depend on a layer if those of any process do.

    Args:
        estimator: Has taken a step's forwards in.
        gatherer: Fed it.

    Returns:
        Layers of which some processes have statistics and some have none.

    Raises:
        RuntimeError: There are such layers, and the approximation needs statistics in each process.
    """
    if not several_processes():
        return set()
    layers = estimator.statistics
    means = {(name, key): mean for name, statistic in layers.items() for key, mean in statistic.means().items()}
    used, called, reached, missed, without, some = _anywhere(
        estimator,
        [
            {key for key, mean in means.items() if mean.weight > 0.0},
            estimator._called,
            gatherer.reached,
            gatherer.unreached,
            {name for name, statistic in layers.items() if statistic.empty},
            {name for name, statistic in layers.items() if not statistic.empty},
        ],
        [*layers, *means],
    )
    for (name, key), mean in means.items():
        elsewhere = name in called and name not in estimator._called
        if elsewhere and (name, key) in used and key not in layers[name].by_rows:
            mean.weight += estimator._passed
    estimator._called |= called
    gatherer.unreached = missed - reached
    partly = without & some
    if kept := sorted(name for name in partly if layers[name].keeps_basis):
        raise RuntimeError(
            f"Layers {kept} were called in some processes and never in others, which approximation="
            f"{estimator.approximation.name!r} cannot do with: call them in each, or use approximation='kfac'."
        )
    return partly


def _anywhere(estimator: Estimator, sets: list[set[Any]], known: list[Any]) -> list[set[Any]]:
    """Unite sets over all processes.

    Args:
        estimator: What the processes have in common.
        sets: This process's.
        known: What they may hold, the same in all processes.

    Returns:
        The unions.
    """
    flags = iter(estimator.in_any_process([one in members for members in sets for one in known]))
    return [{one for one in known if next(flags)} for _ in sets]
