"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from kronfac.experiments.errors import ExperimentError


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Write a file under a temporary name beside it, and move it into place once it is complete and on disk.

    Args:
        path: The file to create or replace. Its folder must exist.

    Yields:
        A binary stream to write the contents to. If the block raises, ``path`` is left as it was.

    Raises:
        ExperimentError: If the file cannot be written, on a full disk for instance.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise ExperimentError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a killed process left in a folder.

    Args:
        folder: A folder nobody else writes to at the moment.
    """
    for path in folder.glob(".*.part"):
        with contextlib.suppress(OSError):
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8.

    Args:
        path: The file to create or replace.
        text: Its contents.
    """
    with replace_atomically(path) as stream:
        stream.write(text.encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write a table as comma-separated values, atomically; None and NaN are empty cells.

    Args:
        path: The file to create or replace.
        rows: At least one row, all with the same columns.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if isinstance(cell, float) and cell != cell else cell for key, cell in row.items()})
    write_text(path, text.getvalue())


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically. NaN and infinity are refused: they are not JSON.

    Args:
        path: The file to create or replace.
        value: What to write.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        ExperimentError: If the file is absent or damaged, or holds something other than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ExperimentError(f"no file {path}") from error
    except (OSError, ValueError) as error:
        raise ExperimentError(f"{path} cannot be read ({error}); delete it to start anew") from error
    if not isinstance(value, dict):
        raise ExperimentError(f"{path} does not hold a JSON object; delete it to start anew")
    return value


def make_folder(path: Path) -> Path:
    """Create a folder that can be written to.

    Args:
        path: The folder; its parents are created too.

    Returns:
        The path.

    Raises:
        ExperimentError: If it cannot be created, is a file, or cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ExperimentError(f"cannot write to {path}: {error.strerror or error}") from error
    return path


def without_nan(row: Mapping[str, object]) -> dict[str, object]:
    """Make a row fit for JSON, which has no NaN.

    Args:
        row: Values by name.

    Returns:
        The same with None for NaN.
    """
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
