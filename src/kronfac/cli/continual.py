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
from kronfac.experiments.continual.grid import SCATTER, choices
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
    steps: Annotated[
        int | None, typer.Option(help="Batches of each task, instead of epochs.", show_default=False)
    ] = None,
    balance: Annotated[
        str,
        typer.Option(
            help="How penalties are weighed: none, or adaptive (brought to the magnitude of the task's loss). A grid "
            "may have both, with a comma between them."
        ),
    ] = "none",
    damping: Annotated[float, typer.Option(help="Added to every penalty's curvature.")] = 0.0,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change a strategy's strength, lr, damping or balance: --set ewc.strength=30. Repeatable.",
            show_default=False,
        ),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="Search instead: --grid lr=1e-3,3e-3 --grid damping=0,0.01. Every strategy is run with all "
            "combinations of lr, damping and strength on the first seed; what the newest tasks' held-out examples "
            "choose is shown, with its accuracy on all tasks.",
            show_default=False,
        ),
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(
            help="Training examples of each task held out, to choose by; by default a hundred in a grid, else none.",
            show_default=False,
        ),
    ] = None,
    slack: Annotated[
        float, typer.Option(help="Target accuracy that a grid gives for a stronger penalty, from 0 to 1.")
    ] = 0.01,
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
    names, place = words(strategies, "--strategies"), out or Path("runs") / stream
    chosen = by_optimizer(settings or [], "--set")
    common = {"out": place, "tasks": tasks, "fresh": fresh, "threads": threads}
    if grid:
        if chosen:
            raise ExperimentError("--set and --grid do not go together: a grid sets what it has as an axis")
        budget = learning.Budget(epochs, steps, lr, damping, held_out=100 if held_out is None else held_out)
        axes, balances = _axes(grid), words(balance, "--balance")
        with _display() as listener:
            found = learning.search(
                stream,
                names,
                axes,
                balances=balances,
                seed=seed_numbers(seeds)[0],
                budget=budget,
                slack=slack,
                listener=listener,
                **common,  # type: ignore[arg-type]
            )
        if as_json:
            print(json.dumps([point._asdict() for point in found.points], indent=2))
            return
        print_table(choices(found), f"{stream}, {tasks} tasks, chosen by the newest task")
        print(f"picture: {found.folder / SCATTER}")
        return
    budget = learning.Budget(epochs, steps, lr, damping, balance, held_out or 0)
    with _display() as listener:
        results = learning.compare(
            stream,
            names,
            seeds=seed_numbers(seeds),
            budget=budget,
            settings=chosen,
            listener=listener,
            **common,  # type: ignore[arg-type]
        )
    if as_json:
        print(json.dumps([json.loads(line) for line in (results.folder / LINES).read_text().splitlines()], indent=2))
        return
    print_table(learning.summary(results), f"{stream}, {tasks} tasks")
    print(f"picture: {results.folder / PICTURE}")


def _axes(texts: Sequence[str]) -> dict[str, list[float]]:
    found = {}
    for text in texts:
        name, _, values = text.partition("=")
        try:
            found[name] = [float(value) for value in values.split(",")]
        except ValueError as error:
            raise ExperimentError(f"--grid must look like lr=0.001,0.003, got {text!r}") from error
    return found


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
