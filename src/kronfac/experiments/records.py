"""Metrics of a run as JSON lines: one per step, with full metrics where an evaluation was due."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from kronfac.experiments.errors import CheckpointError, ExperimentError

#: One line: ``step``, ``epoch``, ``seconds``, ``batch_loss`` and, at evaluations, every metric of the problem.
Record = Mapping[str, float]


class MetricsLog:
    """The file of a run's metrics, open for appending.

    Args:
        path: The file.
        offset: Its length in bytes when the checkpoint was written; what comes after belongs to steps that are
            about to be done again, and is cut off.

    Raises:
        CheckpointError: If the file is shorter than that.
    """

    def __init__(self, path: Path, offset: int) -> None:
        self._file = open(path, "ab")  # noqa: SIM115 - closed by close()
        if self._file.tell() < offset:
            self._file.close()
            raise CheckpointError(
                f"{path} is shorter than its checkpoint says; delete its folder to start the run anew"
            )
        self._file.truncate(offset)
        self._file.seek(offset)

    def append(self, record: Record) -> None:
        """Add a line.

        Args:
            record: Finite numbers by name.
        """
        with self._named():
            self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")

    def offset(self) -> int:
        """Bring the lines to disk.

        Returns:
            The file's length in bytes.
        """
        with self._named():
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._file.tell()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # a full disk, for instance
            raise ExperimentError(f"cannot write {self._file.name}: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the file."""
        with self._named():
            self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_records(path: Path) -> list[dict[str, float]]:
    """Read the metrics of a run, finished or not.

    Args:
        path: The file.

    Returns:
        Its lines; a last line that a kill cut short is left out.

    Raises:
        CheckpointError: If another line is no JSON object.
    """
    records = []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for index, line in enumerate(lines[:-1]):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise CheckpointError(f"{path}, line {index + 1} is damaged; delete its folder to start the run anew")
        records.append(record)
    return records
