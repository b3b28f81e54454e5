"""Statistics that wait until it is known whether they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Held:
    """Does what it is given at once, or, within :meth:`back`, when it is asked for."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] | None = None

    def __call__(self, take: Callable[[], None]) -> None:
        """Do it now, or keep it.

        Args:
            take: What is to be done.
        """
        if self._waiting is None:
            take()
        else:
            self._waiting.append(take)

    @contextmanager
    def back(self, forget: Callable[[], None]) -> Iterator[Callable[[], None]]:
        """Keep what comes within the block.

        Args:
            forget: Called at the end if what was kept was not asked for.

        Yields:
            Does it, and from then on whatever comes at once.
        """
        waiting: list[Callable[[], None]] = []
        self._waiting = waiting

        def take() -> None:
            self._waiting = None
            with torch.enable_grad():  # as in the forward
                for one in waiting:
                    one()

        try:
            yield take
        finally:
            if self._waiting is not None:
                self._waiting = None
                forget()
