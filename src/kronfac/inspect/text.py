"""Plain text tables, sizes in words, and data frames on demand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()) -> str:
    """Lay out a table in columns, two blanks apart.

    Args:
        headings: One per column.
        rows: Cells.
        numbers: Headings of the columns that are aligned at the right.

    Returns:
        Lines without blanks at their ends.
    """
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.rjust(width) if heading in numbers else cell.ljust(width)
            for cell, width, heading in zip(cells, widths, headings, strict=True)
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(headings), line(["-" * width for width in widths]), *map(line, rows)])


def size(count: float) -> str:
    """Word a number of bytes.

    Args:
        count: Bytes.

    Returns:
        The number with a unit, to three digits.
    """
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1000 and len(units) > 1:
        count /= 1024
        del units[0]
    unit = units[0]
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"


def frame(records: Sequence[Mapping[str, Any]]) -> Any:
    """Build a pandas data frame; pandas is imported here and nowhere else.

    Args:
        records: A mapping per row.

    Returns:
        The ``pandas.DataFrame``.

    Raises:
        ModuleNotFoundError: pandas is not installed.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        if error.name != "pandas":
            raise
        raise ModuleNotFoundError(
            "report.table needs pandas: pip install 'kronfac[experiments]'. print(report), report.rows and "
            "report.to_dict() do without.",
            name="pandas",
        ) from error
    return pandas.DataFrame.from_records(list(records))


def plain(value: Any) -> Any:
    """Turn tuples into lists and numbers that JSON does not know (NaN and infinities) into None.

    Args:
        value: Mappings, sequences, texts and numbers.

    Returns:
        The same, fit for ``json.dumps``.
    """
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
