"""One process at a time in a folder of runs; the lock dies with its process, kill -9 included."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from kronfac.experiments.errors import ExperimentError


@contextlib.contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Hold the lock of a folder. Where the system has no ``flock`` (Windows), nothing is locked.

    Args:
        folder: An existing folder; None where nothing is written, and nothing is locked.

    Yields:
        Nothing.

    Raises:
        ExperimentError: If another process holds it, or it cannot be written.
    """
    if folder is None:
        yield
        return
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        opened = open(folder / ".lock", "w")  # noqa: SIM115 - closed by the block below
    except OSError as error:
        raise ExperimentError(f"cannot write {folder / '.lock'}: {error.strerror or error}") from error
    with opened as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ExperimentError(
                f"another process is working in {folder}; wait for it, or choose another folder"
            ) from error
        yield
