"""Learn one task after the other, going on after the last task that was finished.

A run's folder holds ``settings.json``, ``metrics.jsonl`` (a line for each task), ``checkpoint.pt`` and the penalty
while it is unfinished, and ``result.json`` once it is done. Whatever is random is a function of the seed and the task,
so that a run that was stopped gives the numbers of one that was not.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from kronfac.experiments.checkpoint import load_checkpoint, save_checkpoint
from kronfac.experiments.continual.accuracy import accuracy, adapted
from kronfac.experiments.continual.memories import Memory, Options
from kronfac.experiments.continual.strategies import get_strategy
from kronfac.experiments.continual.streams import get_stream
from kronfac.experiments.continual.tasks import Task
from kronfac.experiments.errors import CheckpointError, ExperimentError
from kronfac.experiments.files import make_folder, read_json, remove_leftovers, write_json, write_text

_METRICS, _RESULT, _SETTINGS, _CHECKPOINT = "metrics.jsonl", "result.json", "settings.json", "checkpoint.pt"
_STRIDE = 1_000_003
#: Batches of a task that its first statistics are taken from.
_STATISTICS = 20


@dataclass(frozen=True)
class Plan:
    """Everything that decides one run.

    Attributes:
        stream: Name of the stream.
        strategy: Name of the strategy.
        strength: The strategy's strength, 0 where it has none.
        damping: Added to a penalty's curvature.
        balance: How a penalty is weighed, see `Options`.
        tasks: Number of tasks.
        steps: Batches of a task.
        held_out: Training examples of each task that are kept for the target accuracy instead.
        lr: Learning rate of Adam, which starts afresh with each task.
        batch_size: Examples of a batch.
        seed: Decides tasks, weights, batches and sampled labels.
    """

    stream: str
    strategy: str
    strength: float
    damping: float
    balance: str
    tasks: int
    steps: int
    held_out: int
    lr: float
    batch_size: int
    seed: int

    @property
    def options(self) -> Options:
        """What a penalty is weighed by."""
        return Options(self.strength, self.damping, self.balance)

    @property
    def folder_name(self) -> str:
        """A name that no other plan has."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.strategy}-{self.seed}-{digest}"


class RunError(ExperimentError):
    """A run that comes to no end: it diverges, or its strategy refuses the network. Others may do well."""


class Listener:
    """Hears how runs go; this one says nothing."""

    def plan(self, runs: int, tasks: int) -> None:
        """Hear what there is to do.

        Args:
            runs: Number of runs.
            tasks: Tasks of each.
        """

    def started(self, plan: Plan, done: int) -> None:
        """Hear that a run begins or goes on.

        Args:
            plan: The run.
            done: Tasks that are learned already.
        """

    def stepped(self, fraction: float) -> None:
        """Hear how far a task is.

        Args:
            fraction: From 0 to 1.
        """

    def learned(self, plan: Plan, task: str, accuracies: Sequence[float]) -> None:
        """Hear that a task was learned.

        Args:
            plan: The run.
            task: The task's name.
            accuracies: On each task, in order.
        """

    def failed(self, plan: Plan, reason: str) -> None:
        """Hear that a run came to no end.

        Args:
            plan: The run.
            reason: What went wrong.
        """


def run(plan: Plan, folder: Path, listener: Listener | None = None) -> dict[str, object]:
    """Learn all tasks.

    Args:
        plan: The run, checked.
        folder: The run's own folder; created if need be.
        listener: Hears how it goes.

    Returns:
        The contents of ``result.json``: ``initial`` (accuracies before any training) and ``matrix`` (row i: accuracies
        after task i), ``target`` (of each task right after it was learned, on what was held out; null if nothing was),
        ``adapted`` (see there), ``tasks`` (their names) and ``seconds``.
    """
    listener = listener or Listener()
    make_folder(folder)
    remove_leftovers(folder)
    if (result := finished(folder)) is not None:
        listener.started(plan, plan.tasks)
        return result
    write_json(folder / _SETTINGS, asdict(plan))
    stream = get_stream(plan.stream)
    tasks, model = stream.tasks(plan.tasks, plan.seed, plan.held_out), stream.model(plan.seed)
    memory = get_strategy(plan.strategy).make(plan.options)
    rows: list[dict[str, object]] = []
    initial = [accuracy(model, task) for task in tasks]
    rows = _resume(plan, folder, model, memory)
    _write_metrics(folder, rows)  # a process that was killed after its checkpoint did not come to it
    listener.started(plan, len(rows))
    for index in range(len(rows), plan.tasks):
        started = time.perf_counter()
        loss, value = _learn(plan, model, memory, tasks[: index + 1], listener)
        if index + 1 < plan.tasks:
            _remember(plan, folder, model, memory, tasks[index], index)
        seconds = time.perf_counter() - started
        accuracies = [_recalled(model, memory, task) for task in tasks]
        held = tasks[index].held_out
        rows.append(
            {
                "task": index,
                "name": tasks[index].name,
                "accuracies": accuracies,
                "target": None if held is None else accuracy(model, held),
                "loss": loss,
                "penalty": value,
                "seconds": seconds,
            }
        )
        _keep(plan, folder, model, rows)
        listener.learned(plan, tasks[index].name, accuracies)
    result = {
        "settings": asdict(plan),
        "tasks": [task.name for task in tasks],
        "initial": initial,
        "matrix": [row["accuracies"] for row in rows],
        "target": [row["target"] for row in rows],
        "adapted": adapted(model, tasks),
        "seconds": sum(float(str(row["seconds"])) for row in rows),
    }
    write_json(folder / _RESULT, result)
    for path in (folder / _CHECKPOINT, *folder.glob("penalty-*.safetensors")):
        path.unlink(missing_ok=True)
    return result


def finished(folder: Path) -> dict[str, object] | None:
    """Read the result of a run.

    Args:
        folder: The run's own folder, which need not exist.

    Returns:
        The contents of ``result.json``; None if the run is not done.
    """
    return read_json(folder / _RESULT) if (folder / _RESULT).exists() else None


def _learn(
    plan: Plan, model: nn.Module, memory: Memory, tasks: Sequence[Task], listener: Listener
) -> tuple[float, float]:
    """Train on the newest task, or on all of them where the strategy replays; give the last losses."""
    model.train()
    generator = torch.Generator().manual_seed(plan.seed * _STRIDE + len(tasks))
    optimizer = torch.optim.Adam(model.parameters(), lr=plan.lr)
    now = tasks if memory.replays else tasks[-1:]
    loss = value = 0.0
    orders = [_rows(task, generator, plan.steps * plan.batch_size).split(plan.batch_size) for task in now]
    first = [tasks[-1].training(rows)[0] for rows in orders[-1][:_STATISTICS]]
    with memory.learning(model, first, len(tasks) - 1):
        for step in range(plan.steps):
            optimizer.zero_grad()
            # Replay sees a batch of every task, so that the newest is seen as often as by the others.
            task_loss = _loss(model, now, [order[step] for order in orders])
            total, penalty = memory.loss(task_loss, model)
            total.backward()
            optimizer.step()
            if step % 20 == 0 or step + 1 == plan.steps:
                listener.stepped((step + 1) / plan.steps)
                loss, value = float(task_loss.detach()), 0.0 if penalty is None else float(penalty.detach())
                if not math.isfinite(loss + value):
                    raise RunError(
                        f"{plan.strategy} on {plan.stream}, seed {plan.seed}, diverged at step {step} of task "
                        f"{len(tasks)}; try a smaller strength or learning rate"
                    )
    model.train()
    return loss, value


def _loss(model: nn.Module, tasks: Sequence[Task], rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean loss over tasks, whose examples are one batch: batch norm's statistics are those of all of them."""
    parts = [task.training(chosen) for task, chosen in zip(tasks, rows, strict=True)]
    outputs = model(torch.cat([inputs for inputs, _ in parts])).split([len(targets) for _, targets in parts])
    losses = [
        F.cross_entropy(task.outputs(part), targets)
        for task, part, (_, targets) in zip(tasks, outputs, parts, strict=True)
    ]
    return torch.stack(losses).mean()


def _recalled(model: nn.Module, memory: Memory, task: Task) -> float:
    with memory.recalling(model, task):
        return accuracy(model, task)


def _rows(task: Task, generator: torch.Generator, count: int) -> torch.Tensor:
    """Rows of a task's training set, a permutation after the other."""
    size = len(task.train_inputs)
    return torch.cat([torch.randperm(size, generator=generator) for _ in range(-(-count // size))])[:count]


def _remember(plan: Plan, folder: Path, model: nn.Module, memory: Memory, task: Task, index: int) -> None:
    """Take in a task and write what is kept of it."""
    try:
        memory.remember(model, task, plan.seed * _STRIDE + index)
        memory.save(folder / _penalty(index + 1))
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise RunError(f"{plan.strategy} on {plan.stream}: {error}") from error


def _penalty(learned: int) -> str:
    return f"penalty-{learned}.safetensors"


def _keep(plan: Plan, folder: Path, model: nn.Module, rows: list[dict[str, object]]) -> None:
    """Write what is needed to go on; the number of rows names the penalty that goes with the checkpoint."""
    save_checkpoint(folder / _CHECKPOINT, plan.folder_name, {"model": model.state_dict(), "rows": rows})
    _write_metrics(folder, rows)
    for path in folder.glob("penalty-*.safetensors"):
        if not path.name.startswith(_penalty(len(rows)).removesuffix("safetensors")):
            path.unlink()


def _write_metrics(folder: Path, rows: list[dict[str, object]]) -> None:
    write_text(folder / _METRICS, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def _resume(plan: Plan, folder: Path, model: nn.Module, memory: Memory) -> list[dict[str, object]]:
    path = folder / _CHECKPOINT
    state = load_checkpoint(path, plan.folder_name)
    if state is None:
        return []
    try:
        model.load_state_dict(state["model"])  # type: ignore[arg-type]
        rows = [dict(row) for row in state["rows"]]  # type: ignore[attr-defined]
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} does not fit this run; delete it to start the run anew") from error
    if rows and len(rows) != plan.tasks:
        memory.load(folder / _penalty(len(rows)), model)
    return rows
