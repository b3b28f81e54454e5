"""What a person sees of runs side by side: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kronfac.experiments.reproduce.workers import Listener, News
from kronfac.experiments.settings import RunSettings

_LINE_PERIOD = 30.0


class _Counting(Listener):
    """Steps and runs done.

    Args:
        names: A name for each run.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.totals = names, [0] * len(names)
        self.steps = [0] * len(names)
        self.finished = 0

    def plan(self, runs: Sequence[RunSettings]) -> None:
        self.totals = [settings.steps or 0 for settings in runs]

    def count(self, news: News) -> None:
        if news.run < 0:
            return
        if news.kind == "finished":
            self.finished += 1
            self.steps[news.run] = self.totals[news.run]
        else:
            self.steps[news.run] = max(self.steps[news.run], news.step)

    def ending(self, news: News) -> str:
        return f"[{self.finished}/{len(self.names)}] {self.names[news.run]}: {news.text}"


class Lines(_Counting):
    """A line on standard error at the end of each run, and one every half minute."""

    _last = 0.0

    def news(self, news: News) -> None:
        """Print, if it is worth a line.

        Args:
            news: What a worker says.
        """
        self.count(news)
        if news.kind == "finished":
            print(self.ending(news), file=sys.stderr, flush=True)
        elif news.kind == "evaluated" and time.monotonic() - self._last >= _LINE_PERIOD:
            self._last = time.monotonic()
            done = sum(self.steps) / max(1, sum(self.totals))
            where = f"{self.names[news.run]} at step {news.step} of {self.totals[news.run]}"
            print(f"{100 * done:.1f} % of all steps; {where}", file=sys.stderr, flush=True)


class Bars(_Counting):
    """A bar over all steps, and one for each run in progress.

    Args:
        names: A name for each run.
        bars: Started and stopped by the caller.
    """

    def __init__(self, names: Sequence[str], bars: Progress) -> None:
        super().__init__(names)
        self._bars, self._all = bars, bars.add_task("all runs", total=None)
        self._each: dict[int, TaskID] = {}

    def plan(self, runs: Sequence[RunSettings]) -> None:
        """Set the length of the upper bar.

        Args:
            runs: Settings of all runs.
        """
        super().plan(runs)
        self._bars.update(self._all, total=sum(self.totals))

    def news(self, news: News) -> None:
        """Move the bars.

        Args:
            news: What a worker says.
        """
        self.count(news)
        self._bars.update(self._all, completed=sum(self.steps))
        if news.kind == "finished":
            if news.run in self._each:
                self._bars.remove_task(self._each.pop(news.run))
            self._bars.console.print(escape(self.ending(news)), highlight=False)
        elif news.run >= 0:
            if news.run not in self._each:
                total = self.totals[news.run]
                self._each[news.run] = self._bars.add_task(escape(self.names[news.run]), total=total)
            self._bars.update(self._each[news.run], completed=self.steps[news.run])


@contextmanager
def study_display(names: Sequence[str]) -> Iterator[Listener]:
    """Show progress on standard error for the duration of a block.

    Args:
        names: A name for each run.

    Yields:
        The listener.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines(names)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        yield Bars(names, bars)
