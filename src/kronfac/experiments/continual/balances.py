"""Ways to weigh a penalty against the task's loss, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from kronfac.continual import GradientNorms, RunningMeans
from kronfac.continual.balance import Magnitudes, values


@dataclass(frozen=True)
class Balance:
    """A way to weigh a penalty.

    Attributes:
        title: Its name for people.
        description: One line for people.
        start: Makes, when a task begins, what tells `kronfac.continual.balance` the magnitudes; None for fixed weights.
    """

    title: str
    description: str
    start: Callable[[nn.Module], Magnitudes | None]


#: By name; all but the first are readings of the factors α of Lee et al. 2020, A.6.
BALANCES: dict[str, Balance] = {
    "none": Balance("fixed weights", "added as it is", lambda _: None),
    "adaptive": Balance("balanced", "brought to the magnitude of the task's loss at every step", lambda _: values),
    "running": Balance(
        "balanced by running means", "the same by running means of both over steps", lambda _: RunningMeans()
    ),
    "gradients": Balance(
        "balanced by gradients",
        "by the norms of both gradients, at the price of a further backward pass",
        lambda model: GradientNorms(model.parameters()),
    ),
}
