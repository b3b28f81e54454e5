"""Runs side by side in processes of one thread each, resumable one by one."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from queue import Empty
from typing import NamedTuple

import torch

from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.files import make_folder
from kronfac.experiments.lock import locked
from kronfac.experiments.memory import keep_freed_memory
from kronfac.experiments.problems import Data, get_problem
from kronfac.experiments.progress import Progress
from kronfac.experiments.results import run_folder
from kronfac.experiments.runner import RESULT, run
from kronfac.experiments.settings import RunSettings

_POLL, _GRACE = 0.2, 60.0


class News(NamedTuple):
    """What a worker says.

    Attributes:
        kind: ``"started"``, ``"evaluated"``, ``"finished"``, ``"failed"`` or ``"stopped"``.
        run: Index of the run; -1 where it is of none.
        step: Steps done.
        text: A status, an error, or nothing.
    """

    kind: str
    run: int
    step: int = 0
    text: str = ""


class Listener:
    """Hears how the runs go; this one says nothing."""

    def plan(self, runs: Sequence[RunSettings]) -> None:
        """Hear what is to be done.

        Args:
            runs: Settings of all runs.
        """

    def news(self, news: News) -> None:
        """Hear what a worker says.

        Args:
            news: It.
        """


def train_all(
    runs: Sequence[RunSettings],
    folder: Path,
    workers: int,
    listener: Listener | None = None,
    checkpoint_every: float = 20.0,
) -> None:
    """Train, each run in its own folder below ``folder``, and go on where an earlier call was stopped.

    Args:
        runs: Settings of the runs; they start in this order.
        folder: Folder of the study, which the caller has locked.
        workers: Number of processes.
        listener: Hears how it goes.
        checkpoint_every: Seconds between a run's checkpoints.

    Raises:
        ExperimentError: A run failed, or a process was killed.
        KeyboardInterrupt: On Ctrl-C, once every run in progress is checkpointed.
    """  # noqa: DOC502
    listener = listener or Listener()
    listener.plan(runs)
    done = [(run_folder(folder, settings) / RESULT).exists() for settings in runs]
    for index in (index for index, there in enumerate(done) if there):
        listener.news(News("finished", index, 0, "already there"))
    context = multiprocessing.get_context("spawn")
    stop, heard = context.Event(), context.Queue()
    tasks: Queue[int | None] = context.Queue()
    for task in (*(index for index, there in enumerate(done) if not there), *[None] * workers):
        tasks.put(task)
    arguments = (list(runs), folder, tasks, heard, stop, checkpoint_every)
    count = min(workers, done.count(False))
    processes = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(count)]
    try:
        with _terminated():
            for process in processes:
                process.start()
            _listen(processes, heard, listener)
    except BaseException:
        stop.set()
        _drain(processes, heard, listener)
        raise
    finally:
        for process in processes:
            process.join(timeout=_GRACE)


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does: workers must hear of the end."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _listen(processes: Sequence[BaseProcess], heard: Queue[News], listener: Listener) -> None:
    while True:
        alive = any(process.is_alive() for process in processes)
        try:
            news = heard.get(timeout=_POLL if alive else 0.01)
        except Empty:
            if dead := [p.exitcode for p in processes if p.exitcode not in (None, 0)]:
                raise ExperimentError(
                    f"a worker process ended with code {dead[0]} (killed, or out of memory?); the same command goes on"
                ) from None
            if not alive:
                return
            continue
        if news.kind == "failed":
            raise ExperimentError(news.text)
        listener.news(news)


def _drain(processes: Sequence[BaseProcess], heard: Queue[News], listener: Listener) -> None:
    """Wait for the runs in progress to write their checkpoints; a queue that nobody reads would hold them up."""
    until = time.monotonic() + _GRACE
    while any(process.is_alive() for process in processes) and time.monotonic() < until:
        with contextlib.suppress(Empty):
            news = heard.get(timeout=_POLL)
            if news.kind == "finished":
                listener.news(news)


class _Reporter(Progress):
    """Passes a run's progress on, and ends it when the study is stopped or its process has died."""

    def __init__(self, index: int, heard: Queue[News], stop: Event) -> None:
        self._index, self._heard, self._stop, self._looked = index, heard, stop, 0.0

    def started(self, settings: RunSettings, step: int) -> None:
        self._heard.put(News("started", self._index, step))

    def stepped(self, step: int, seconds: float, batch_loss: float) -> None:
        if time.monotonic() - self._looked < _POLL:
            return
        self._looked = time.monotonic()
        parent = multiprocessing.parent_process()
        if self._stop.is_set() or (parent is not None and not parent.is_alive()):
            signal.raise_signal(signal.SIGTERM)  # the runner writes a checkpoint after this step

    def evaluated(self, step: int, seconds: float, metrics: Mapping[str, float]) -> None:
        self._heard.put(News("evaluated", self._index, step))

    def finished(self, settings: RunSettings, status: str, note: str) -> None:
        self._heard.put(News("finished", self._index, 0, f"{status} ({note})" if note else status))


def _work(
    runs: list[RunSettings],
    folder: Path,
    tasks: Queue[int | None],
    heard: Queue[News],
    stop: Event,
    checkpoint_every: float,
) -> None:
    """What a worker process does. A terminal sends Ctrl-C to all; the first one says what then."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    torch.set_num_threads(1)
    keep_freed_memory()
    data: dict[str, Data] = {}
    index = -1
    try:
        while not stop.is_set() and (task := tasks.get()) is not None:
            index, settings = task, runs[task]
            if settings.problem not in data:
                data[settings.problem] = get_problem(settings.problem).data().to(settings.device)
            own = make_folder(run_folder(folder, settings))
            with _patiently_locked(own):
                problem, reporter = get_problem(settings.problem), _Reporter(index, heard, stop)
                run(problem, settings, data[settings.problem], own, reporter, checkpoint_every)
    except KeyboardInterrupt:
        heard.put(News("stopped", index))
        if not stop.is_set():
            raise SystemExit(1) from None
    except ExperimentError as error:
        heard.put(News("failed", index, 0, str(error)))


@contextlib.contextmanager
def _patiently_locked(folder: Path) -> Iterator[None]:
    """Lock a run; where the study was killed a moment ago, its worker may need the rest of a step to notice."""
    for wait in (0.5, 1.0, 2.0, 4.0, 0.0):
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(folder))
            except ExperimentError:
                if not wait:
                    raise
                time.sleep(wait)
                continue
            yield
            return
