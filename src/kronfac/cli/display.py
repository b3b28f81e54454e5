"""What a person sees: live bars on a terminal, plain lines elsewhere, and tables."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table as RichTable

from kronfac.cli.fitting import fit
from kronfac.experiments.present import Table
from kronfac.experiments.progress import Progress
from kronfac.experiments.settings import RunSettings

_BAR_PERIOD, _LINE_PERIOD = 0.1, 5.0


def name_of(settings: RunSettings) -> str:
    """Name a run for people.

    Args:
        settings: Its settings.

    Returns:
        Optimiser, learning rate (if it has one) and seed.
    """
    rate = settings.hyperparameters.get("lr")  # optimisers that tune themselves have none
    return f"{settings.optimizer}{'' if rate is None else f' lr={rate}'} seed {settings.seed}"


class _Display(Progress):
    """What both displays keep of the run in progress."""

    def __init__(self) -> None:
        self.settings: RunSettings | None = None
        self.runs, self.number, self.last, self.metrics = 0, 0, 0.0, ""

    def plan(self, runs: int) -> None:
        self.runs = runs

    def started(self, settings: RunSettings, step: int) -> None:
        self.settings, self.metrics, self.last = settings, "", time.monotonic()
        self.number += 1

    def evaluated(self, step: int, seconds: float, metrics: Mapping[str, float]) -> None:
        shown = list(metrics.items())[:2]
        self.metrics = "  ".join(f"{name} {value:.4g}" for name, value in shown)

    def due(self, period: float) -> bool:
        now = time.monotonic()
        if now - self.last < period:
            return False
        self.last = now
        return True

    def ending(self, status: str, note: str) -> str:
        return f"{status}{f' ({note})' if note else ''}{f'  {self.metrics}' if self.metrics else ''}"


class Lines(_Display):
    """A plain line on standard error every five seconds, and one at the end of each run."""

    def message(self, text: str) -> None:
        """Print a line.

        Args:
            text: The line.
        """
        print(text, file=sys.stderr, flush=True)

    def stepped(self, step: int, seconds: float, batch_loss: float) -> None:
        """Print a line if the last one is old enough.

        Args:
            step: Steps done.
            seconds: Seconds of training.
            batch_loss: The loss of the batch.
        """
        if self.settings is not None and self.due(_LINE_PERIOD):
            total = f"/{self.settings.steps}" if self.settings.steps else ""
            self.message(
                f"{self._where()} step {step}{total}, {seconds:.1f} s, batch loss {batch_loss:.4g}  {self.metrics}"
            )

    def finished(self, settings: RunSettings, status: str, note: str) -> None:
        """Print how the run ended.

        Args:
            settings: The run's settings.
            status: ``"done"`` or ``"diverged"``.
            note: What there is to say about it.
        """
        self.message(f"{self._where()} {self.ending(status, note)}")

    def _where(self) -> str:
        return f"[{self.number}/{self.runs}] {name_of(self.settings)}:" if self.settings else ""


class LiveBars(_Display):
    """A bar over all runs and one for the run in progress, with its metrics.

    Args:
        bars: The bars, started and stopped by the caller.
    """

    def __init__(self, bars: Bars) -> None:
        super().__init__()
        self._bars = bars
        self._all = bars.add_task("runs", total=None, note="")
        self._one: TaskID | None = None

    def plan(self, runs: int) -> None:
        """Set the length of the upper bar.

        Args:
            runs: How many runs there will be.
        """
        super().plan(runs)
        self._bars.update(self._all, total=runs)

    def message(self, text: str) -> None:
        """Print a line above the bars.

        Args:
            text: The line.
        """
        self._bars.console.print(escape(text), highlight=False)

    def started(self, settings: RunSettings, step: int) -> None:
        """Put up the run's bar: over its steps, or over its seconds where steps are not limited.

        Args:
            settings: The run's settings.
            step: Steps that a checkpoint already holds.
        """
        super().started(settings, step)
        total = settings.steps if settings.steps is not None else settings.seconds
        completed = step if settings.steps is not None else 0
        self._one = self._bars.add_task(escape(name_of(settings)), total=total, completed=completed, note="")

    def stepped(self, step: int, seconds: float, batch_loss: float) -> None:
        """Move the bar, at most ten times a second: drawing takes time from training.

        Args:
            step: Steps done.
            seconds: Seconds of training.
            batch_loss: The loss of the batch.
        """
        if self._one is not None and self.settings is not None and self.due(_BAR_PERIOD):
            completed = step if self.settings.steps is not None else round(seconds, 1)
            self._bars.update(self._one, completed=completed, note=f"{seconds:6.1f} s  {self.metrics}")

    def finished(self, settings: RunSettings, status: str, note: str) -> None:
        """Replace the run's bar by a line.

        Args:
            settings: The run's settings.
            status: ``"done"`` or ``"diverged"``.
            note: What there is to say about it.
        """
        if self._one is not None:
            self._bars.remove_task(self._one)
            self._one = None
        self._bars.advance(self._all)
        self.message(f"{name_of(settings)}: {self.ending(status, note)}")


@contextmanager
def progress_display() -> Iterator[Progress]:
    """Show progress on standard error for the duration of a block, the program's log messages included.

    Yields:
        What to hand to `kronfac.experiments.compare`.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Bars(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True) as bars:
            display: Progress = LiveBars(bars)
            with _log_to(display):
                yield display
    else:
        display = Lines()
        with _log_to(display):
            yield display


@contextmanager
def _log_to(display: Progress) -> Iterator[None]:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            display.message(record.getMessage())

    logger, handler = logging.getLogger("kronfac"), Handler()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def print_table(table: Table, title: str = "") -> None:
    """Print a table on standard output: drawn on a terminal, aligned text elsewhere.

    Args:
        table: The table.
        title: A heading, if any.
    """
    console = Console()
    if console.is_terminal:
        for index, (part, widths) in enumerate(fit(table, console.width)):
            console.print(_drawn(part, widths, "" if index else title))
        return
    if title:
        print(title)
    widths = [max(map(cell_len, cells)) for cells in zip(table.columns, *table.rows, strict=True)]
    for row in (table.columns, *table.rows):
        spaces = (" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
        cells = (
            cell + space if index in table.words else space + cell
            for index, (cell, space) in enumerate(zip(row, spaces, strict=True))
        )
        print("  ".join(cells).rstrip())


def _drawn(table: Table, widths: Sequence[int], title: str) -> RichTable:
    drawn = RichTable(title=escape(title) or None, title_justify="left", title_style="bold")
    for index, (column, width) in enumerate(zip(table.columns, widths, strict=True)):
        side: JustifyMethod = "left" if index in table.words else "right"
        drawn.add_column(escape(column), justify=side, width=width, overflow="fold")
    styles = {"chosen": "bold green", "bad": "red"}
    for index, row in enumerate(table.rows):
        drawn.add_row(*map(escape, row), style=styles.get(table.marks.get(index, "")))
    return drawn
