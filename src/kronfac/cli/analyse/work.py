"""Progress of an analysis, and options that analyses of approximation errors share."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.files import replace_atomically
from kronfac.experiments.settings import MAX_SEED, MOST_THREADS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRAINING, _OUTPUT, _MACHINE = "Training", "Output", "Machine"
_LINE_PERIOD = 5.0
#: GiB, more than any machine has.
MOST_MEMORY = 1e6

Approximations = Annotated[
    str, typer.Option(help="Approximations to compare, with commas between them, or all that there are.")
]
Samples = Annotated[int, typer.Option(help="Samples of the sources sampled and root.", min=1)]
Examples = Annotated[int, typer.Option(help="Training examples whose curvature is looked at; the first ones.", min=1)]
TrainSteps = Annotated[
    int, typer.Option(help="Steps of training first; 0: the initial weights.", min=0, rich_help_panel=_TRAINING)
]
Optimizer = Annotated[
    str,
    typer.Option(
        "--optimizer",
        "--optimiser",
        help="Whose training, with the values tuned for the problem.",
        rich_help_panel=_TRAINING,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change a hyper-parameter of the optimiser: --set lr=0.01. Repeatable.",
        show_default=False,
        rich_help_panel=_TRAINING,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        help="Decides initial weights, the order of examples and sampled labels.",
        min=0,
        max=MAX_SEED,
        rich_help_panel=_TRAINING,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for tables and pictures.", rich_help_panel=_OUTPUT, show_default=False),
]
MemoryLimit = Annotated[
    float,
    typer.Option(help="GiB that the exact curvature may take.", min=0.001, max=MOST_MEMORY, rich_help_panel=_MACHINE),
]
Threads = Annotated[
    int | None,
    typer.Option(help="Torch threads.", min=1, max=MOST_THREADS, rich_help_panel=_MACHINE, show_default=False),
]


def chosen(text: str) -> list[str] | None:
    """Read a list of approximations.

    Args:
        text: Names with commas between them, or ``all``.

    Returns:
        The names; None for all.

    Raises:
        ExperimentError: If one is unknown, or named twice.
    """
    from kronfac.approximations import get_approximation
    from kronfac.cli.options import words

    if text == "all":
        return None
    names = words(text, "--approximations")
    if len(set(names)) < len(names):
        raise ExperimentError(f"--approximations names one twice: {text}")
    with one_line():
        for name in names:
            get_approximation(name)
    return names


def values_for(settings: list[str] | None, steps: int) -> dict[str, str]:
    """Read ``--set`` of a training of so many steps.

    Args:
        settings: ``name=value`` texts, if any.
        steps: Steps of training.

    Returns:
        Values by name.

    Raises:
        ExperimentError: If there are values, and no steps.
    """
    from kronfac.cli.options import assignments

    if settings and steps == 0:
        raise ExperimentError(f"--set {settings[0]} has no effect: there are no steps of training")
    return assignments(settings or [], "--set")


def write_picture(path: Path, axes: Axes) -> None:
    """Write the figure that axes belong to, atomically.

    Args:
        path: The PNG file.
        axes: The axes.
    """
    with replace_atomically(path) as stream:
        axes.get_figure(root=True).savefig(stream, format="png")  # type: ignore[union-attr]


@contextmanager
def one_line() -> Iterator[None]:
    """Word what an analysis refuses as one line for the person who asked.

    Yields:
        Nothing.

    Raises:
        ExperimentError: In place of what was raised.
    """
    try:
        yield
    except ExperimentError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ExperimentError(str(error)) from error


@contextmanager
def threads_of(number: int | None) -> Iterator[None]:
    """Use that many threads for the duration of a block.

    Args:
        number: Torch threads; None for those in use.

    Yields:
        Nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Work:
    """Plain lines on standard error, at most one every five seconds.

    Args:
        total: Pieces of work there will be, or None if nobody knows yet.
    """

    def __init__(self, total: int | None) -> None:
        self.total, self.done, self._last = total, 0, time.monotonic()

    def begin(self, note: str) -> None:
        """Hear that a piece of work begins.

        Args:
            note: What it is.
        """
        if time.monotonic() - self._last >= _LINE_PERIOD:
            self._last = time.monotonic()
            total = "" if self.total is None else f"/{self.total}"
            print(f"[{self.done}{total}] {note}", file=sys.stderr, flush=True)
        self.done += 1

    def message(self, text: str) -> None:
        """Say something.

        Args:
            text: One line.
        """
        print(text, file=sys.stderr, flush=True)


class BarWork(Work):
    """A bar.

    Args:
        total: Pieces of work there will be, or None.
        bars: Started and stopped by the caller.
    """

    def __init__(self, total: int | None, bars: Progress) -> None:
        super().__init__(total)
        self._bars = bars
        self._task = bars.add_task("analysis", total=total, note="")

    def begin(self, note: str) -> None:
        """Move the bar, and write beside it.

        Args:
            note: What begins.
        """
        self._bars.update(self._task, completed=self.done, note=escape(note))
        self.done += 1

    def message(self, text: str) -> None:
        """Print a line above the bar.

        Args:
            text: The line.
        """
        self._bars.console.print(escape(text), highlight=False)


@contextmanager
def working(total: int | None) -> Iterator[Work]:
    """Show progress on standard error for the duration of a block.

    Args:
        total: Pieces of work there will be, or None.

    Yields:
        What to tell.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Work(total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True) as bars:
        yield BarWork(total, bars)
