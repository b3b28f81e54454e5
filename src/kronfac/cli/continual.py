"""``kronfac continual``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from kronfac.cli.display import print_table
from kronfac.cli.options import Fresh, Json, Out, by_optimizer, seed_numbers, words
from kronfac.experiments import continual as learning
from kronfac.experiments.continual.compare import LINES, PICTURE
from kronfac.experiments.errors import ExperimentError

EPILOG = (
    "[bold]Streams[/bold]\n\n"
    + "\n\n".join(f"{s.name}: {s.description}" for s in learning.STREAMS.values())
    + "\n\n[bold]Strategies[/bold]\n\n"
    + "\n\n".join(
        f"{s.name}: {s.description}" + (f" (strength {s.strength:g})" if s.strength else "")
        for s in learning.STRATEGIES.values()
    )
    + "\n\nevery approximation of kronfac.approximations, such as ekfac: a penalty with it for each task"
)
# One by default: networks and batches are so small that more threads cost more than they save.
Threads = Annotated[int, typer.Option(help="Torch threads.", rich_help_panel="Machine")]


def continual(
    stream: Annotated[str, typer.Argument(help="Name of a stream of tasks, see the list below.", show_default=False)],
    strategies: Annotated[
        str, typer.Option(help="Names of strategies, with commas between them.")
    ] = "finetune,joint,l2,ewc,online-ewc,kfac",
    tasks: Annotated[int, typer.Option(help="Number of tasks.")] = 5,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between them: each is a run of every strategy.")] = "0",
    epochs: Annotated[
        int | None, typer.Option(help="Passes through each task's data; by default the stream's.", show_default=False)
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of Adam; by default the stream's.", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a strength: --set ewc.strength=30. Repeatable.", show_default=False),
    ] = None,
    out: Out = None,
    as_json: Json = False,
    fresh: Fresh = False,
    threads: Threads = 1,
) -> None:
    """Learn one task after the other with several strategies, and see what they remember.

    Every strategy starts from the same weights and sees the same tasks and batches. Stopped by Ctrl-C or killed, the
    same command goes on after the last task that was finished. The folder then holds accuracies as JSON lines and their
    matrices as a picture.

    [dim]kronfac continual permuted-digits --strategies finetune,ewc,kfac --seeds 0,1,2 --out runs/permuted[/dim]
    """  # noqa: DOC501 - a person reads this as help
    strengths: dict[str, object] = {}
    for strategy, values in by_optimizer(settings or [], "--set").items():
        if stray := [name for name in values if name != "strength"]:
            raise ExperimentError(f"{strategy} has no setting {stray[0]!r}; known: strength")
        strengths[strategy] = values["strength"]
    with _display() as listener:
        results = learning.compare(
            stream,
            words(strategies, "--strategies"),
            out=out or Path("runs") / stream,
            tasks=tasks,
            seeds=seed_numbers(seeds),
            epochs=epochs,
            lr=lr,
            strengths=strengths,
            fresh=fresh,
            threads=threads,
            listener=listener,
        )
    if as_json:
        print(json.dumps([json.loads(line) for line in (results.folder / LINES).read_text().splitlines()], indent=2))
        return
    print_table(learning.summary(results), f"{stream}, {tasks} tasks")
    print(f"picture: {results.folder / PICTURE}")


class _Lines(learning.Listener):
    """A plain line on standard error for each task that was learned."""

    def learned(self, plan: learning.Plan, task: str, accuracies: Sequence[float]) -> None:
        print(_line(plan, task, accuracies), file=sys.stderr, flush=True)


class _Bars(learning.Listener):
    """A bar over all tasks of all runs, and a line above it for each that was learned."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._bar: TaskID = bars.add_task("tasks", total=None)
        self._tasks, self._before, self._done = 1, -1, 0

    def plan(self, runs: int, tasks: int) -> None:
        self._tasks = tasks
        self._bars.update(self._bar, total=runs * tasks)

    def started(self, plan: learning.Plan, done: int) -> None:
        self._before += 1
        self._done = done
        self._bars.update(self._bar, description=escape(f"{plan.strategy} seed {plan.seed}"))
        self.stepped(0.0)

    def stepped(self, fraction: float) -> None:
        self._bars.update(self._bar, completed=self._before * self._tasks + self._done + fraction)

    def learned(self, plan: learning.Plan, task: str, accuracies: Sequence[float]) -> None:
        self._done += 1
        self._bars.console.print(escape(_line(plan, task, accuracies)), highlight=False)


def _line(plan: learning.Plan, task: str, accuracies: Sequence[float]) -> str:
    shown = " ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies)
    return f"{plan.strategy} seed {plan.seed}: learned {task}; accuracy [%] on each task: {shown}"


@contextmanager
def _display() -> Iterator[learning.Listener]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        yield _Bars(bars)
