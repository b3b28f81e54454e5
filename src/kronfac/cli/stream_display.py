"""What a person sees while a stream of tasks is learned."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from kronfac.experiments import continual as learning


class Lines(learning.Listener):
    """A plain line on standard error for each task that was learned."""

    def learned(self, plan: learning.Plan, task: str, accuracies: Sequence[float]) -> None:
        """Print the accuracies.

        Args:
            plan: The run.
            task: The task's name.
            accuracies: On each task, in order.
        """
        print(_line(plan, task, accuracies), file=sys.stderr, flush=True)

    def failed(self, plan: learning.Plan, reason: str) -> None:
        """Print what went wrong.

        Args:
            plan: The run.
            reason: What went wrong.
        """
        print(f"failed: {reason}", file=sys.stderr, flush=True)


class Bars(learning.Listener):
    """A bar over all tasks of all runs, and a line above it for each that was learned.

    Args:
        bars: The bar's place, started and stopped by the caller.
    """

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._bar: TaskID = bars.add_task("tasks", total=None)
        self._tasks, self._before, self._done = 1, -1, 0

    def plan(self, runs: int, tasks: int) -> None:
        """Set the length of the bar.

        Args:
            runs: Number of runs.
            tasks: Tasks of each.
        """
        self._tasks = tasks
        self._bars.update(self._bar, total=runs * tasks)

    def started(self, plan: learning.Plan, done: int) -> None:
        """Put the run's name beside the bar.

        Args:
            plan: The run.
            done: Tasks that are learned already.
        """
        self._before += 1
        self._done = done
        self._bars.update(self._bar, description=escape(f"{plan.strategy} seed {plan.seed}"))
        self.stepped(0.0)

    def stepped(self, fraction: float) -> None:
        """Move the bar.

        Args:
            fraction: Of the task, from 0 to 1.
        """
        self._bars.update(self._bar, completed=self._before * self._tasks + self._done + fraction)

    def learned(self, plan: learning.Plan, task: str, accuracies: Sequence[float]) -> None:
        """Print the accuracies above the bar.

        Args:
            plan: The run.
            task: The task's name.
            accuracies: On each task, in order.
        """
        self._done += 1
        self._bars.console.print(escape(_line(plan, task, accuracies)), highlight=False)

    def failed(self, plan: learning.Plan, reason: str) -> None:
        """Print what went wrong above the bar.

        Args:
            plan: The run.
            reason: What went wrong.
        """
        self._bars.console.print(f"[red]failed: {escape(reason)}[/red]", highlight=False)


def _line(plan: learning.Plan, task: str, accuracies: Sequence[float]) -> str:
    shown = " ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies)
    return f"{plan.strategy} seed {plan.seed}: learned {task}; accuracy [%] on each task: {shown}"


@contextmanager
def stream_display() -> Iterator[learning.Listener]:
    """Show progress on standard error for the duration of a block.

    Yields:
        What to hand to `kronfac.experiments.continual.compare` or ``search``.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        yield Bars(bars)
