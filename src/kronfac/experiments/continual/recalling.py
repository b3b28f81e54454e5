"""A quadratic penalty that keeps each task's batch norm statistics as moments of the layers' inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from kronfac.continual import TaskStatistics
from kronfac.experiments.continual.memories import Options, Quadratic, examples
from kronfac.experiments.continual.tasks import Task
from kronfac.experiments.errors import CheckpointError
from kronfac.storage import StorageError

#: Examples of a batch that moments are taken of: statistics of a batch should be those of the task.
_BATCH = 1000


class Recalling(Quadratic):
    """Tests an earlier task with the statistics that its batch norms would have under the present weights.

    Args:
        options: What the penalty is weighed by.
        approximation: Name of the approximation, of which one anchor and the nearest product to the sum are kept.
    """

    def __init__(self, options: Options, approximation: str) -> None:
        super().__init__(options, approximation, online=True, combine="nearest")
        self._statistics: TaskStatistics | None = None

    @contextmanager
    def recalling(self, model: nn.Module, task: Task) -> Iterator[None]:
        """Give the model a task's statistics, if the task is known.

        Args:
            model: The live network.
            task: The task.

        Yields:
            Nothing.
        """
        if self._statistics is None or task.name not in self._statistics.tasks:
            yield
            return
        with self._statistics.using(task.name):
            yield

    def remember(self, model: nn.Module, task: Task, seed: int) -> None:
        """Estimate the task's curvature, and take in its moments.

        Args:
            model: The network at the task's optimum.
            task: The task.
            seed: Of the examples chosen and the labels drawn.
        """
        super().remember(model, task, seed)
        if self._statistics is None:
            self._statistics = TaskStatistics(model)
        self._statistics.remember(task.name, [inputs for inputs, _ in examples(task, _BATCH, seed)])

    def save(self, path: Path) -> None:
        """Write the penalty, and the moments beside it.

        Args:
            path: The penalty's file.
        """
        super().save(path)
        if self._statistics is not None:
            self._statistics.save(_beside(path))

    def load(self, path: Path, model: nn.Module) -> None:
        """Read what `save` wrote.

        Args:
            path: The penalty's file.
            model: The network.

        Raises:
            CheckpointError: If a file is absent or damaged.
        """
        super().load(path, model)
        self._statistics = TaskStatistics(model)
        try:
            self._statistics.load(_beside(path))
        except (StorageError, OSError) as error:
            raise CheckpointError(f"{error}; delete the run's folder to start it anew") from error


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}.statistics{path.suffix}")
