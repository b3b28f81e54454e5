"""How a table fits a terminal: words are broken into lines, columns move below, and no number is cut."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len

from kronfac.experiments.present import Table

#: Characters between columns, and at the ends of a line, of the frame that is drawn.
_BETWEEN, _ENDS = 3, 4
#: A cell of words up to here stays on one line; a longer one gets at least as much.
_WORDS = 24


def fit(table: Table, width: int) -> list[tuple[Table, list[int]]]:
    """Divide a table into ones that are no wider than a terminal.

    Args:
        table: The table.
        width: Characters of a line of the terminal.

    Returns:
        Tables that begin with the columns of names, each with the width of every column; one if all columns fit.
    """
    least, whole = _least(table), _whole(table)
    names = _names(table, whole, width)
    room = width - _ENDS - sum(least[index] + _BETWEEN for index in names[1:]) - least[0]
    groups: list[list[int]] = []
    left = -1
    for index in range(len(names), len(table.columns)):
        needed = least[index] + _BETWEEN
        if needed > left:
            groups.append([*names])
            left = room
        groups[-1].append(index)
        left -= needed
    return [(_part(table, group), _widths(group, least, whole, width)) for group in groups or [names]]


def _names(table: Table, whole: Sequence[int], width: int) -> list[int]:
    """Find the first columns that say what a row is about, and come again in each table: words, and not too wide."""
    found = [0]
    for index in range(1, len(table.columns)):
        taken = sum(whole[i] + _BETWEEN for i in (*found, index))
        if not {0, index} <= set(table.words) or whole[index] > _WORDS or taken > width / 2:
            break
        found.append(index)
    return found


def _widths(group: Sequence[int], least: Sequence[int], whole: Sequence[int], width: int) -> list[int]:
    """Give columns what they need, and what is left of the line to those that would have more, from the left."""
    left = width - _ENDS - _BETWEEN * (len(group) - 1) - sum(least[index] for index in group)
    widths = []
    for index in group:
        more = min(whole[index] - least[index], max(left, 0))
        left -= more
        widths.append(least[index] + more)
    if left < 0:  # a terminal too narrow for two columns: the last one is broken anywhere
        widths[-1] = max(widths[-1] + left, 1)
    return widths


def _least(table: Table) -> list[int]:
    found = []
    for index, heading in enumerate(table.columns):
        needed = [cell_len(row[index]) for row in table.rows]
        if index in table.words:
            needed = [min(length, _WORDS) for length in needed]
        found.append(max([*needed, *map(cell_len, heading.split()), 1]))
    return found


def _whole(table: Table) -> list[int]:
    cells = zip(table.columns, *table.rows, strict=True)
    return [max(1, *(cell_len(cell) for cell in column)) for column in cells]


def _part(table: Table, group: Sequence[int]) -> Table:
    return Table(
        [table.columns[index] for index in group],
        [[row[index] for index in group] for row in table.rows],
        table.marks,
        tuple(place for place, index in enumerate(group) if index in table.words),
    )
