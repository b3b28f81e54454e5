"""Inverses computed beside the training steps, and handed over at a step that is fixed beforehand.

A refresh that is due at step ``t`` copies the statistics and the damping of that step and factorises the copies, all in
a worker thread; the result takes effect at step ``t + delay`` and never at another one. Whoever comes first waits: the
training before it changes the statistics until they are copied, and at the hand-over until the inverses are there. So
a training run is the same bit for bit whatever the machine does, and so is a resumed one, since a saved state holds the
finished result.

On a GPU the copies and the factorisations are queued on a stream of their own, and run beside the training's kernels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch

from kronfac import processes
from kronfac.linalg.side_by_side import workers
from kronfac.optim.refresh import Refreshed


@dataclass
class Pending:
    """A refresh on its way.

    Attributes:
        started: The step whose statistics it is made of.
        due: The step at which it takes effect.
        future: The result.
        copied: Set once the statistics may change again.
    """

    started: int
    due: int
    future: Future[Refreshed]
    copied: threading.Event

    def result(self) -> Refreshed:
        """Wait for the inverses; a failure is raised here as `torch.linalg.LinAlgError`, naming the layer.

        Returns:
            The inverses.
        """
        return self.future.result()

    @classmethod
    def finished(cls, started: int, due: int, refreshed: Refreshed) -> Pending:
        """A refresh whose result is there, from a saved state.

        Args:
            started: The step whose statistics it was made of.
            due: The step at which it takes effect.
            refreshed: The result.

        Returns:
            The refresh.
        """
        future: Future[Refreshed] = Future()
        future.set_result(refreshed)
        return cls(started, due, future, _already())

    @classmethod
    def failed(cls, started: int, due: int, error: ArithmeticError | RuntimeError) -> Pending:
        """A refresh that failed, from a saved state.

        Args:
            started: The step whose statistics it was made of.
            due: The step at which the failure is raised.
            error: The failure.

        Returns:
            The refresh.
        """
        future: Future[Refreshed] = Future()
        future.set_exception(error)
        return cls(started, due, future, _already())


def submit(
    copy: Callable[[], Callable[[], Refreshed]], started: int, delay: int, device: torch.device | None = None
) -> Pending:
    """Start a refresh in the worker thread, which all optimisers of a process share.

    Args:
        copy: Copies the statistics and returns the rest of the work.
        started: The present step.
        delay: After how many steps the result takes effect.
        device: Where the statistics are; the CPU by default.

    Returns:
        The refresh.
    """
    if device is not None and device.type == "cuda":
        return Pending(started, started + delay, _submit_beside(copy, device), _already())
    copied = threading.Event()

    def work() -> Refreshed:
        with torch.no_grad():
            try:
                rest = copy()
            finally:
                copied.set()
            return rest()

    if processes.together():
        here = copy()  # the processes exchange sums, in the order of the training
        copied.set()
        return Pending(started, started + delay, _worker().submit(torch.no_grad()(here)), copied)
    return Pending(started, started + delay, _worker().submit(work), copied)


def _submit_beside(copy: Callable[[], Callable[[], Refreshed]], device: torch.device) -> Future[Refreshed]:
    """Queue a refresh on the side stream: its copies before anything the training queues from now on."""
    training, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(training)
    with torch.no_grad(), torch.cuda.stream(side):
        rest = copy()
    training.wait_stream(side)  # the statistics may change once they are copied

    def work() -> Refreshed:
        with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(side):
            refreshed = rest()
            for inverse in refreshed.inverses.values():
                for tensor in inverse.tensors().values():
                    tensor.record_stream(training)  # which reads them, so that their memory is not given away before
            side.synchronize()
            return refreshed

    return _worker().submit(work)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _already() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


def _worker() -> ThreadPoolExecutor:
    return workers("kronfac-inverses", 1)
