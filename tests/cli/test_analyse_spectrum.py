from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kronfac.cli.main import app


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["analyse", "spectrum", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_table_picture_and_numbers(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    arguments = ["digits-mlp", "--layers", "4", "--examples", "20", "--approximations", "kfac,diagonal"]
    code, text, _ = call(*arguments, "--out", str(tmp_path / "out"))
    assert code == 0
    assert "above largest/1000" in text
    assert (tmp_path / "out" / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "out" / "spectrum.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 3 * 330
    code, text, _ = call(*arguments, "--out", str(tmp_path / "out"), "--json")
    outcome = json.loads(text)
    assert list(outcome["layers"]["4"]) == ["exact", "kfac", "diagonal"]
    exact = [float(row["eigenvalue"]) for row in rows if row["approximation"] == "exact"]
    assert outcome["layers"]["4"]["exact"] == exact
    assert sum(exact) == pytest.approx(sum(outcome["layers"]["4"]["diagonal"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "unknown problem 'nope'"),
        (["digits-mlp", "--layers", "9"], "layers ['9'] have no curvature block"),
        (["digits-mlp", "--approximations", "kfac,foo"], "approximation='foo' is unknown"),
        (["digits-mlp", "--approximations", "kfac,,"], "--approximations must be names"),
        (["digits-mlp", "--approximations", "kfac_tridiagonal"], "spectrum takes layers one by one"),
        (["digits-autoencoder"], "are too large to be taken apart"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    code, text, error = call(*arguments, "--out", str(tmp_path / "out"))
    assert (code, text, error.count("\n")) == (2, "", 1)
    assert message in error
    assert not (tmp_path / "out").exists()
