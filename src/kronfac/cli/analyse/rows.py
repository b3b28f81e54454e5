"""Rows of an analysis, printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path

from kronfac.cli.display import print_table
from kronfac.experiments.present import Table, number


def print_rows(rows: Sequence[Mapping[str, object]], words: tuple[int, ...], files: Sequence[Path]) -> None:
    """Print rows as a table, and the files that were written.

    Args:
        rows: The rows, with the same keys each; None is shown as a dash.
        words: Indices of the columns that hold words.
        files: The files.
    """
    columns = list(rows[0])
    cells = [[number(nan if row[c] is None else row[c], ".3f") for c in columns] for row in rows]
    print_table(Table(columns, cells, words=words))
    print(f"written: {', '.join(map(str, files))}")
