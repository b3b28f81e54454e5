"""Progress of an analysis: a bar on a terminal, plain lines elsewhere; warnings become lines too."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_LINE_PERIOD = 5.0


class Watch:
    """Plain lines on standard error, at most one every five seconds.

    Args:
        steps: Steps of training there will be.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.done, self._last = steps, 0, time.monotonic()
        self._told: set[str] = set()

    def stepped(self, done: int, note: str) -> None:
        """Hear that a step of training was done.

        Args:
            done: Steps done.
            note: What there is to say.
        """
        self.done = done
        self.working(note)

    def working(self, note: str) -> None:
        """Hear what is being worked on.

        Args:
            note: What.
        """
        if time.monotonic() - self._last >= _LINE_PERIOD:
            self._last = time.monotonic()
            self.message(f"step {self.done}/{self.steps}: {note}")

    def message(self, text: str) -> None:
        """Say something.

        Args:
            text: One line.
        """
        print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Say something once.

        Args:
            text: One line.
        """
        if text not in self._told:
            self._told.add(text)
            self.message(f"warning: {text}")


class BarWatch(Watch):
    """A bar over the steps of training, with what is being worked on beside it.

    Args:
        steps: Steps of training there will be.
        bars: Started and stopped by the caller.
    """

    def __init__(self, steps: int, bars: Progress) -> None:
        super().__init__(steps)
        self._bars = bars
        self._task = bars.add_task("steps", total=steps, note="")

    def working(self, note: str) -> None:
        """Write beside the bar.

        Args:
            note: What is being worked on.
        """
        self._bars.update(self._task, completed=self.done, note=escape(note))

    def message(self, text: str) -> None:
        """Print a line above the bar.

        Args:
            text: The line.
        """
        self._bars.console.print(escape(text), highlight=False)


@contextmanager
def watching(steps: int) -> Iterator[Watch]:
    """Show progress on standard error for the duration of a block.

    Args:
        steps: Steps of training there will be.

    Yields:
        What to tell.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        watch = Watch(steps)
        with _told_to(watch):
            yield watch
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True) as bars:
        watch = BarWatch(steps, bars)
        with _told_to(watch):
            yield watch


@contextmanager
def _told_to(watch: Watch) -> Iterator[None]:
    """Pass on the warnings of the measurement, which are for the person at the terminal."""
    from kronfac.analysis import ConvergenceWarning
    from kronfac.estimator import CoverageWarning

    with warnings.catch_warnings():
        for category in (ConvergenceWarning, CoverageWarning):
            warnings.simplefilter("always", category)
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: object) -> None:
            if issubclass(category, ConvergenceWarning | CoverageWarning):
                watch.warn(str(message))
            else:
                shown(message, category, *rest)  # type: ignore[arg-type]

        warnings.showwarning = show  # type: ignore[assignment]
        yield
