"""What a run is: everything that decides its course, and a name made from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.optimizers.options import Parser, integer, number, optional

#: The largest seed. Seeds are multiplied by up to a million, which torch's generators must still take.
MAX_SEED = 10**12
#: More steps than anybody can wait for.
MAX_STEPS = 10**12
#: More than any machine has; torch takes more than it can start, and dies of it later.
MOST_THREADS = 1024


@dataclass(frozen=True)
class Budget:
    """When a run ends: at the first of the limits it reaches.

    Attributes:
        steps: Number of steps, or None.
        seconds: Seconds of training, evaluation excluded, or None.
    """

    steps: int | None = None
    seconds: float | None = None

    def progress(self, steps: int, seconds: float) -> float:
        """Say how much of the budget is used, for schedules of the learning rate.

        Args:
            steps: Steps done.
            seconds: Seconds used.

        Returns:
            A fraction in [0, 1]; of the steps where they are limited (so that it is reproducible), else of the seconds.
        """
        if self.steps is not None:
            return min(1.0, steps / self.steps)
        return min(1.0, seconds / self.seconds) if self.seconds else 0.0

    def spent(self, steps: int, seconds: float) -> bool:
        """Say whether the run has come to its end.

        Args:
            steps: Steps done.
            seconds: Seconds used.

        Returns:
            Whether a limit is reached.
        """
        return (self.steps is not None and steps >= self.steps) or (
            self.seconds is not None and seconds >= self.seconds
        )


@dataclass(frozen=True)
class RunSettings:
    """Everything that decides the course of one run.

    Attributes:
        problem: Name of the problem.
        optimizer: Name of the optimiser.
        hyperparameters: A value for each of the optimiser's hyper-parameters.
        seed: Decides initial weights, the order of examples and sampled labels.
        steps: Budget in steps, or None.
        seconds: Budget in training seconds, or None.
        evaluate_every: Steps between evaluations.
        device: Torch device.
    """

    problem: str
    optimizer: str
    hyperparameters: Mapping[str, object]
    seed: int
    steps: int | None
    seconds: float | None
    evaluate_every: int
    device: str = "cpu"

    @property
    def budget(self) -> Budget:
        """When the run ends."""
        return Budget(self.steps, self.seconds)

    @property
    def folder_name(self) -> str:
        """A name that changes with every setting: runs with other settings never share a folder."""
        later = {option.name: option.default for option in get_optimizer(self.optimizer).all_options if option.later}
        values = {k: v for k, v in self.hyperparameters.items() if k not in later or v != later[k]}
        content = json.dumps(asdict(self) | {"hyperparameters": values}, sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()
        return f"{self.optimizer}-seed{self.seed}-{digest[:10]}"


def check_settings(settings: RunSettings) -> None:
    """Refuse settings out of range.

    Args:
        settings: The settings of a run.

    Raises:
        ExperimentError: Naming the setting, its value and what is accepted.
    """
    rules: dict[str, Parser] = {
        "seed": integer(0, MAX_SEED),
        "steps": optional(integer(1, MAX_STEPS)),
        "seconds": optional(number(0.0, open_low=True)),
        "evaluate_every": integer(1),
    }
    for name, parse in rules.items():
        try:
            parse(getattr(settings, name))
        except ValueError as error:
            raise ExperimentError(f"{name} must be {error}, got {getattr(settings, name)!r}") from None
    if settings.steps is None and settings.seconds is None:
        raise ExperimentError("a run needs a budget: steps, epochs or seconds")
    get_optimizer(settings.optimizer).resolve(settings.hyperparameters)
