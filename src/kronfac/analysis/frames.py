"""Rows as a data frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def to_frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Build a pandas data frame from the rows of an analysis.

    Args:
        rows: A mapping per row.

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
            "to_frame needs pandas: pip install 'kronfac[experiments]'. The rows are plain mappings and do without.",
            name="pandas",
        ) from error
    return pandas.DataFrame.from_records(list(rows))
