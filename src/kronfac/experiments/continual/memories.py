"""What strategies keep between tasks, and what they add to the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import kronfac as kf
from kronfac import continual
from kronfac.continual import Penalty, PenaltySum, QuadraticPenalty, RecentredDecay
from kronfac.continual.balance import Magnitudes
from kronfac.experiments.continual.balances import BALANCES
from kronfac.experiments.continual.tasks import Task
from kronfac.experiments.continual.views import View, estimation_batch
from kronfac.experiments.errors import CheckpointError

#: Examples that a task's curvature is estimated on, at most.
CURVATURE_EXAMPLES = 2000


@dataclass(frozen=True)
class Options:
    """What a penalty is weighed by.

    Attributes:
        strength: Factor of the curvature.
        damping: ``τ`` of ``C + τ I``, the curvature's mean over tasks: weight decay around the newest optimum.
        balance: ``"none"``: ``L + Σ_j P_j``; otherwise `kronfac.continual.balance` of ``L`` and the mean ``P_j``, by
            the rule of that name in `BALANCES`.
    """

    strength: float = 0.0
    damping: float = 0.0
    balance: str = "none"


class Memory:
    """What a strategy keeps between tasks; this one keeps nothing, which is fine-tuning."""

    #: Whether it trains on the data of all tasks so far.
    replays = False

    @contextmanager
    def learning(self, model: nn.Module, inputs: Sequence[Tensor], learned: int) -> Iterator[None]:
        """Go around the training of a task.

        Args:
            model: The live network, in train mode.
            inputs: Batches of the new task's inputs.
            learned: How many tasks were learned before.

        Yields:
            Nothing.
        """
        yield

    def loss(self, task_loss: Tensor, model: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Give what is minimised.

        Args:
            task_loss: The task's loss, of a batch that the network was shown just now.
            model: The live network.

        Returns:
            The loss, and the penalty in it if there is one.
        """
        return task_loss, None

    @contextmanager
    def recalling(self, model: nn.Module, task: Task) -> Iterator[None]:
        """Go around a test of a task.

        Args:
            model: The live network.
            task: The task.

        Yields:
            Nothing.
        """
        yield

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
        options: What it is weighed by.
        view: The weights that it acts on.
    """

    def __init__(self, options: Options, view: View | None = None) -> None:
        self.options = options
        self.view = View() if view is None else view
        self.kept: Penalty | None = None
        self._damping: Penalty | None = None
        self._learned = 0
        self._magnitudes: Magnitudes | None = None

    @contextmanager
    def learning(self, model: nn.Module, inputs: Sequence[Tensor], learned: int) -> Iterator[None]:
        """Let the view prepare the network, set the damping around the newest optimum, and begin to balance.

        Args:
            model: The live network, in train mode.
            inputs: Batches of the new task's inputs.
            learned: How many tasks were learned before.

        Yields:
            Nothing.
        """
        if self.kept is not None and self.options.damping:
            newest = terms(self.kept)[-1]
            assert isinstance(newest, QuadraticPenalty | RecentredDecay)
            self._damping = RecentredDecay(newest.anchor, self.options.strength * self.options.damping)
        self._learned = learned
        self._magnitudes = BALANCES[self.options.balance].start(model)
        with self.view.learning(model, inputs, later=self.kept is not None):
            yield

    def loss(self, task_loss: Tensor, model: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Add the penalty.

        Args:
            task_loss: The task's loss.
            model: The live network.

        Returns:
            The loss, and the sum of the tasks' penalties.
        """
        if self.kept is None:
            return task_loss, None
        live, summed = self.view.live(model), count_tasks(self.kept)
        value = self.kept(live)
        if self._damping is not None:
            value = value + summed * self._damping(live)
        if self._magnitudes is not None:
            mean = value / summed
            return continual.balance(task_loss, mean, self._learned, magnitudes=self._magnitudes).loss, value
        return task_loss + value, value

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
        self.kept = continual.recentred_decay(model, self.options.strength)


class Quadratic(PenaltyMemory):
    """A quadratic penalty with a curvature for each task.

    Args:
        options: What it is weighed by.
        approximation: Name of the approximation.
        online: Keep one anchor, the newest optimum, and the sum of all curvatures.
        combine: How curvatures are then added, see `QuadraticPenalty.update`.
        view: The weights that it acts on.
    """

    def __init__(
        self,
        options: Options,
        approximation: str,
        online: bool = False,
        combine: str = "exact",
        view: View | None = None,
    ) -> None:
        super().__init__(options, view)
        self.approximation, self.online, self.combine = approximation, online, combine

    def remember(self, model: nn.Module, task: Task, seed: int) -> None:
        """Estimate the task's curvature at its optimum.

        Args:
            model: The network at the task's optimum.
            task: The task.
            seed: Of the examples chosen and the labels drawn.
        """
        curvature = kf.estimate(
            self.view.subject(model),
            kf.Categorical(),
            examples(task, estimation_batch(model), seed),
            approximation=self.approximation,
            source="sampled",
            seed=seed,
            outputs=task.outputs,
        )
        anchor = self.view.anchor(model)
        if self.online and isinstance(self.kept, QuadraticPenalty):
            self.kept = self.kept.update(curvature, anchor, decay=1.0, combine=self.combine)
        else:
            term = QuadraticPenalty(curvature, anchor, strength=self.options.strength)
            self.kept = term if self.kept is None else self.kept + term


def examples(task: Task, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Choose what a task is remembered by.

    Args:
        task: The task.
        size: Examples of a batch.
        seed: Of the choice.

    Returns:
        Batches of inputs and targets, `CURVATURE_EXAMPLES` at most.
    """
    order = torch.randperm(len(task.train_inputs), generator=torch.Generator().manual_seed(seed))
    # Of a single example there is no variance, which batch norm and what couples examples take.
    return [task.training(part) for part in order[:CURVATURE_EXAMPLES].split(size) if len(part) > 1]


def terms(penalty: Penalty) -> tuple[Penalty, ...]:
    """Dissolve a sum.

    Args:
        penalty: A penalty.

    Returns:
        Its terms.
    """
    return penalty.terms if isinstance(penalty, PenaltySum) else (penalty,)


def count_tasks(penalty: Penalty) -> int:
    """Count the tasks whose penalties a penalty is the sum of; a squared distance counts for one, whatever it holds.

    Args:
        penalty: A penalty.

    Returns:
        At least 1.
    """
    return sum(term.tasks if isinstance(term, QuadraticPenalty) else 1 for term in terms(penalty))
