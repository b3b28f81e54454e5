"""Settings of the whole process, made for a block that may be open in several threads at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any


class ForAllThreads:
    """A setting of the process: the first block that is open in any thread makes it, and the last one puts it back.

    Were each to remember what it found, a block might find what another one had set, and leave it for good.

    Args:
        setting: Makes the setting, as a context manager.
    """

    def __init__(self, setting: Callable[[], AbstractContextManager[Any]]) -> None:
        self._setting, self._lock = setting, threading.Lock()
        self._blocks, self._made = 0, ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Have it within the block.

        Yields:
            Nothing.
        """
        with self._lock:
            if self._blocks == 0:
                self._made.enter_context(self._setting())
            self._blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                if self._blocks == 0:
                    self._made.close()
