"""Rows as a data frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any


def to_frame(rows: Sequence[Any]) -> Any:
    """Build a pandas data frame from the rows of an analysis.

    Args:
        rows: A mapping per row, or a dataclass such as those of `spectrum` and `alignment`.

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
            "to_frame needs pandas: pip install 'kronfac[experiments]'. The rows themselves do without.",
            name="pandas",
        ) from error
    return pandas.DataFrame.from_records([_mapping(row) for row in rows])


def _mapping(row: Any) -> Mapping[str, Any]:
    if is_dataclass(row):
        return {field.name: getattr(row, field.name) for field in fields(row)}
    mapping: Mapping[str, Any] = row
    return mapping
