"""Files that an analysis leaves behind."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kronfac.experiments.files import replace_atomically, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def records(rows: Sequence[Any]) -> list[dict[str, object]]:
    """Turn dataclass rows into mappings, the step first.

    Args:
        rows: Rows with a ``step``.

    Returns:
        One mapping each.
    """
    return [{"step": row.step} | asdict(row) for row in rows]


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write a table.

    Args:
        path: The file.
        rows: At least one row, all with the same columns.

    Returns:
        The path.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
    return path


def write_picture(path: Path, axes: Axes) -> Path:
    """Write the figure that axes belong to.

    Args:
        path: The PNG file.
        axes: The axes.

    Returns:
        The path.
    """
    with replace_atomically(path) as stream:
        axes.figure.savefig(stream, format="png")  # type: ignore[union-attr]
    return path


def for_json(rows: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Replace what JSON does not have: NaN and infinities become null.

    Args:
        rows: The rows.

    Returns:
        New rows.
    """
    return [
        {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()} for row in rows
    ]
