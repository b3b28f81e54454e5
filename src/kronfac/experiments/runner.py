"""Train one (problem, optimiser, hyper-parameters, seed) in a folder, going on from its checkpoint if it has one.

The folder holds ``settings.json``, ``metrics.jsonl``, ``checkpoint.pt`` while the run is unfinished, and
``result.json`` once it is done. A run with a budget in steps that was killed and started again writes the same metrics,
bit for bit and but for the seconds, as one that was not.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from kronfac.experiments.checkpoint import load_checkpoint, save_checkpoint
from kronfac.experiments.errors import CheckpointError, ExperimentError
from kronfac.experiments.files import make_folder, read_json, remove_leftovers, write_json
from kronfac.experiments.problems.base import Data, Problem
from kronfac.experiments.progress import Progress
from kronfac.experiments.records import MetricsLog
from kronfac.experiments.settings import RunSettings
from kronfac.experiments.training import Diverged, Training

METRICS, RESULT, SETTINGS, CHECKPOINT = "metrics.jsonl", "result.json", "settings.json", "checkpoint.pt"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a request to terminate arrived; the run is checkpointed and can go on later."""


def run(
    problem: Problem,
    settings: RunSettings,
    data: Data,
    folder: Path,
    progress: Progress | None = None,
    checkpoint_every: float = 5.0,
) -> dict[str, object]:
    """Train until the budget is spent or the run diverges.

    Args:
        problem: The problem.
        settings: The run's settings, checked.
        data: The problem's data, on the run's device.
        folder: The run's own folder; created if need be.
        progress: Hears how the run goes.
        checkpoint_every: Seconds of wall clock between checkpoints. They do not change the metrics.

    Returns:
        The contents of ``result.json``: ``status`` (``"done"`` or ``"diverged"``), ``note``, ``step``, ``seconds``,
        ``threads`` (the numbers of torch threads that trained it, one after the other).

    Raises:
        Interrupted: After writing a checkpoint, if Ctrl-C or SIGTERM arrived.
        ExperimentError: If the folder cannot be written or its files are unusable.
    """  # noqa: DOC502
    progress = progress or Progress()
    make_folder(folder)
    remove_leftovers(folder)
    if (folder / RESULT).exists():
        result = read_result(folder / RESULT)
        progress.started(settings, int(result["step"]))  # type: ignore[call-overload]
        note = str(result["note"] or "already there")
        progress.finished(settings, str(result["status"]), note + _other_threads(result.get("threads", ())))
        return result
    write_json(folder / SETTINGS, asdict(settings))
    device = torch.device(settings.device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _signals() as interrupted:
        _rehearse(problem, settings, data)
        torch.manual_seed(settings.seed)
        training = Training(problem, settings, data, interrupted.is_set)
        offset, threads = _resume(training, folder)
        progress.started(settings, training.step)
        if other := _other_threads(threads):
            progress.message(f"{settings.optimizer} seed {settings.seed} goes on at step {training.step}{other}")
        threads = [*threads, *({torch.get_num_threads()} - set(threads[-1:]))]
        with MetricsLog(folder / METRICS, offset) as log:
            status, note = "done", ""
            try:
                _train(training, folder, log, progress, checkpoint_every, interrupted, threads)
            except Diverged as reason:
                status, note = "diverged", f"diverged at step {training.step}: {reason}"
            log.offset()
    result = {"status": status, "note": note, "step": training.step, "seconds": training.seconds, "threads": threads}
    write_json(folder / RESULT, result)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    progress.finished(settings, status, note)
    return result


def read_result(path: Path) -> dict[str, object]:
    """Read how a run ended.

    Args:
        path: Its ``result.json``.

    Returns:
        The contents: ``status``, ``note``, ``step``, ``seconds``.

    Raises:
        ExperimentError: If the file is damaged or holds something else.
    """
    result = read_json(path)
    known = result.get("status") in ("done", "diverged") and isinstance(result.get("note", 0), str | None)
    threads = result.get("threads", [])
    known = known and isinstance(threads, list) and all(isinstance(number, int) for number in threads)
    if not (known and isinstance(result.get("step"), int) and isinstance(result.get("seconds"), int | float)):
        raise ExperimentError(f"{path} does not say how a run ended; delete it to start anew")
    return result


def _rehearse(problem: Problem, settings: RunSettings, data: Data) -> None:
    """Do one step of a training that is thrown away: what is loaded on first use shall be in nobody's seconds."""
    values = dict(settings.hyperparameters)
    if values.get("warm_up"):
        values["warm_up"] = 1  # as many as there are would cost as much again
    with contextlib.suppress(Diverged):
        Training(problem, replace(settings, hyperparameters=values), data).advance()


def _other_threads(threads: object) -> str:
    """What to add about a run that other numbers of threads trained than the present one; nothing if none did."""
    others = [number for number in list(threads) if number != torch.get_num_threads()]  # type: ignore[call-overload]
    if not others:
        return ""
    numbers = " and ".join(str(number) for number in dict.fromkeys(others))
    return f", trained with {numbers} threads, not {torch.get_num_threads()}: its last digits may be others"


def _resume(training: Training, folder: Path) -> tuple[int, list[int]]:
    """Give the length of the metrics so far, and the numbers of threads that made them."""
    path = folder / CHECKPOINT
    state = load_checkpoint(path, training.settings.folder_name)
    if state is None:
        return 0, []
    try:
        training.load_state_dict(state)
        return int(state["metrics_offset"]), list(state.get("threads", []))  # type: ignore[call-overload]
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} does not fit this run; delete it to start the run anew") from error


def _train(
    training: Training,
    folder: Path,
    log: MetricsLog,
    progress: Progress,
    checkpoint_every: float,
    interrupted: threading.Event,
    threads: list[int],
) -> None:
    budget, every = training.settings.budget, training.settings.evaluate_every

    def checkpoint() -> None:
        state = training.state_dict() | {"metrics_offset": log.offset(), "threads": threads}
        save_checkpoint(folder / CHECKPOINT, training.settings.folder_name, state)

    if training.step == 0:
        metrics = training.evaluate()
        log.append({"step": 0, "epoch": 0.0, "seconds": 0.0, **metrics})
        progress.evaluated(0, 0.0, metrics)
    last = time.monotonic()
    while not budget.spent(training.step, training.seconds):
        training.advance()
        record = {"step": training.step, "epoch": training.epoch, "seconds": training.seconds}
        record["batch_loss"] = training.batch_loss
        record |= training.diagnostics()
        progress.stepped(training.step, training.seconds, training.batch_loss)
        if training.step % every == 0 or budget.spent(training.step, training.seconds):
            metrics = training.evaluate()
            record |= metrics
            progress.evaluated(training.step, training.seconds, metrics)
        log.append(record)
        if interrupted.is_set():
            checkpoint()
            raise Interrupted
        if time.monotonic() - last >= checkpoint_every:
            checkpoint()
            last = time.monotonic()


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """Turn Ctrl-C and SIGTERM into an event that is looked at between steps, never in the middle of one.

    A second Ctrl-C interrupts at once, at the price of the steps since the last checkpoint.

    Yields:
        The event.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield event
        return

    def handle(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
