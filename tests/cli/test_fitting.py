from __future__ import annotations

import pytest
from rich.console import Console

from kronfac.cli import display
from kronfac.cli.fitting import fit
from kronfac.experiments.present import Table

TABLE = Table(
    ["optimiser", "status", "train loss", "train squared error", "test loss", "test squared error", "steps", "seconds"],
    [
        ["SGD-momentum", "done", "0.1633 ± 0.022", "0.07384", "16.46", "0.7617", "1000", "20.39"],
        ["KFAC", "diverged", "0.07222 ± 0.0035", "0.003155", "17.73", "1.081", "1000", "8.05"],
    ],
    words=(0, 1),
)
LONG = Table(["optimiser", "hyper-parameters"], [["KFAC", "lr=0.3, momentum=0.8, " * 9]], words=(0, 1))


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("table", [TABLE, LONG], ids=["numbers", "words"])
def test_no_cell_is_cut_on_a_narrow_terminal(
    table: Table, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(display, "Console", lambda: Console(force_terminal=True, width=width, color_system=None))
    display.print_table(table, "what it is")
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= width
    for cell in (cell for row in table.rows for cell in row):
        assert all(word in printed for word in (cell.split(", ") if table is LONG else [cell]))


def test_columns_move_below_where_they_do_not_fit_and_names_come_again() -> None:
    assert [part.columns for part, _ in fit(TABLE, 200)] == [TABLE.columns]
    parts = [part for part, _ in fit(TABLE, 60)]
    assert len(parts) > 1
    assert all(part.columns[:2] == ["optimiser", "status"] and part.words == (0, 1) for part in parts)
    assert [column for part in parts for column in part.columns[2:]] == TABLE.columns[2:]
    for part, widths in fit(TABLE, 60):
        assert sum(widths) + 3 * len(widths) + 1 <= 60
        assert all(len(row[i]) <= widths[i] for row in part.rows for i in range(len(widths)))


def test_a_table_of_one_column_or_without_rows_fits() -> None:
    assert fit(Table(["a"], []), 10)[0][1] == [1]
    assert fit(Table(["a", "number"], []), 80)[0][1] == [1, 6]


def test_piped_tables_count_characters_by_the_room_they_take(capsys: pytest.CaptureFixture[str]) -> None:
    display.print_table(Table(["n", "v"], [["日本", "1"], ["ab", "2"]]))
    assert capsys.readouterr().out.splitlines() == ["n     v", "日本  1", "ab    2"]
