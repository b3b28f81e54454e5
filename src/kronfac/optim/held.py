"""Statistics that wait until it is known whether they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Held:
    """Does what it is given at once, or, within :meth:`back`, when it is asked for.

    Args:
        device: Type of the model's device, of whose precision (autocast) what waits is done with that of its time.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._waiting: list[Callable[[], None]] | None = None
        self._reads = False

    @property
    def reads(self) -> bool:
        """Whether something waits that reads the graph of the training forward, which is to be kept as long."""
        return bool(self._waiting) and self._reads

    def __call__(self, take: Callable[[], None], *, reads: bool = True) -> None:
        """Do it now, or keep it.

        Args:
            take: What is to be done.
            reads: Whether it reads the graph of the training forward.
        """
        if self._waiting is None:
            take()
        else:
            self._reads |= reads
            self._waiting.append(self._as_now(take))

    def _as_now(self, take: Callable[[], None]) -> Callable[[], None]:
        device = self._device
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

        def later() -> None:
            with torch.enable_grad(), torch.autocast(device, dtype, enabled):
                take()

        return later

    @contextmanager
    def back(self, forget: Callable[[], None]) -> Iterator[Callable[[], None]]:
        """Keep what comes within the block.

        Args:
            forget: Called at the end if what was kept was not asked for.

        Yields:
            Does it, and from then on whatever comes at once.
        """
        waiting: list[Callable[[], None]] = []
        self._waiting, self._reads = waiting, False

        def take() -> None:
            self._waiting = None
            for one in waiting:
                one()

        try:
            yield take
        finally:
            if self._waiting is not None:
                self._waiting = None
                forget()
