"""What is done against forgetting."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import kronfac as kf
from kronfac import continual
from kronfac.approximations import APPROXIMATIONS
from kronfac.continual import Penalty, QuadraticPenalty
from kronfac.experiments.continual.streams import Task
from kronfac.experiments.errors import CheckpointError, ExperimentError, UnknownNameError

#: Examples that a task's curvature is estimated on, at most.
CURVATURE_EXAMPLES = 2000
_BATCH = 500


class Memory:
    """What a strategy keeps between tasks; this one keeps nothing, which is fine-tuning."""

    #: Whether it trains on the data of all tasks so far.
    replays = False

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Give what is added to the task's loss.

        Args:
            model: The live network.

        Returns:
            A 0-dim tensor, or None for nothing.
        """
        return None

    def remember(self, model: nn.Module, task: Task, seed: int) -> None:
        """Take in a task that was learned.

        Args:
            model: The network at the task's optimum.
            task: The task.
            seed: Of everything random.
        """

    def save(self, path: Path) -> None:
        """Write what is kept, if anything.

        Args:
            path: The file.
        """

    def load(self, path: Path, model: nn.Module) -> None:
        """Read what `save` wrote.

        Args:
            path: The file.
            model: The network.
        """


class Replay(Memory):
    """All data of all tasks so far: what a strategy without that data is measured against."""

    replays = True


class PenaltyMemory(Memory):
    """A penalty that grows with each task.

    Args:
        strength: Factor of each task's term.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.kept: Penalty | None = None

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Evaluate the penalty.

        Args:
            model: The live network.

        Returns:
            A 0-dim tensor; None before the first task is learned.
        """
        return None if self.kept is None else self.kept(model)

    def save(self, path: Path) -> None:
        """Write the penalty.

        Args:
            path: The file.
        """
        if self.kept is not None:
            continual.save(self.kept, path)

    def load(self, path: Path, model: nn.Module) -> None:
        """Read the penalty.

        Args:
            path: The file.
            model: The network.

        Raises:
            CheckpointError: If it is absent or damaged.
        """
        try:
            self.kept = continual.load(path, model)
        except (kf.StorageError, OSError) as error:
            raise CheckpointError(f"{error}; delete the run's folder to start it anew") from error


class Centre(PenaltyMemory):
    """``½ strength |θ - θ*|²`` around the newest optimum."""

    def remember(self, model: nn.Module, task: Task, seed: int) -> None:
        """Move the centre.

        Args:
            model: The network at the task's optimum.
            task: The task.
            seed: Unused.
        """
        self.kept = continual.recentred_decay(model, self.strength)


class Quadratic(PenaltyMemory):
    """A quadratic penalty with a curvature for each task.

    Args:
        strength: Factor of each task's term.
        approximation: Name of the approximation.
        online: Keep one anchor, the newest optimum, and the sum of all curvatures.
        combine: How curvatures are then added, see `QuadraticPenalty.update`.
    """

    def __init__(self, strength: float, approximation: str, online: bool = False, combine: str = "exact") -> None:
        super().__init__(strength)
        self.approximation, self.online, self.combine = approximation, online, combine

    def remember(self, model: nn.Module, task: Task, seed: int) -> None:
        """Estimate the task's curvature at its optimum.

        Args:
            model: The network at the task's optimum.
            task: The task.
            seed: Of the examples chosen and the labels drawn.
        """
        order = torch.randperm(len(task.train_inputs), generator=torch.Generator().manual_seed(seed))
        rows = order[:CURVATURE_EXAMPLES]
        pairs = [(task.train_inputs[part], task.train_targets[part]) for part in rows.split(_BATCH)]
        curvature = kf.estimate(
            model,
            kf.Categorical(),
            pairs,
            approximation=self.approximation,
            source="sampled",
            seed=seed,
            outputs=task.outputs,
        )
        if self.online and isinstance(self.kept, QuadraticPenalty):
            self.kept = self.kept.update(curvature, decay=1.0, combine=self.combine)
        else:
            term = QuadraticPenalty(curvature, strength=self.strength)
            self.kept = term if self.kept is None else self.kept + term


@dataclass(frozen=True)
class Strategy:
    """A way to learn one task after the other.

    Attributes:
        name: What it is asked for by.
        title: Its name for people.
        description: One line for people.
        make: Makes an empty memory from the strength.
        strength: The default strength; None where there is no such setting.
    """

    name: str
    title: str
    description: str
    make: Callable[[float], Memory]
    strength: float | None = None

    def checked(self, strength: object) -> float:
        """Read a strength.

        Args:
            strength: A number or a text; None for the default.

        Returns:
            The strength, 0 where the strategy has none.

        Raises:
            ExperimentError: If it is no number above 0, or the strategy has none.
        """
        if strength is None:
            return self.strength or 0.0
        if self.strength is None:
            raise ExperimentError(f"{self.name} has no strength")
        try:
            value = float(str(strength))
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise ExperimentError(f"{self.name}.strength must be a number above 0, got {strength!r}")
        return value


#: Strategies by name; every approximation of `kronfac.approximations` is one as well.
STRATEGIES: dict[str, Strategy] = {
    s.name: s
    for s in (
        Strategy("finetune", "fine-tuning", "nothing is done", lambda _: Memory()),
        Strategy("joint", "joint", "trains on the data of all tasks so far", lambda _: Replay()),
        Strategy("l2", "L2 anchor", "squared distance from the newest optimum", Centre, 0.2),
        Strategy(
            "ewc", "EWC", "diagonal Fisher for each task, at its optimum", lambda s: Quadratic(s, "diagonal"), 10.0
        ),
        Strategy(
            "online-ewc",
            "online EWC",
            "sum of diagonal Fishers around the newest optimum",
            lambda s: Quadratic(s, "diagonal", online=True),
            30.0,
        ),
        Strategy(
            "kfac", "KFAC penalty", "Kronecker-factored Fisher for each task", lambda s: Quadratic(s, "kfac"), 30.0
        ),
        Strategy(
            "online-kfac",
            "online KFAC",
            "nearest Kronecker product to the sum, around the newest optimum",
            lambda s: Quadratic(s, "kfac", online=True, combine="nearest"),
            30.0,
        ),
    )
}


def get_strategy(name: str) -> Strategy:
    """Find a strategy.

    Args:
        name: Its name, or that of an approximation.

    Returns:
        The strategy.

    Raises:
        UnknownNameError: If there is none of that name.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    if name in APPROXIMATIONS:
        return Strategy(name, f"{name} penalty", "a penalty for each task", lambda s: Quadratic(s, name), 30.0)
    raise UnknownNameError("strategy", name, [*STRATEGIES, *(n for n in APPROXIMATIONS if n not in STRATEGIES)])
