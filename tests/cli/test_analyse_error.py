from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from tests.cli.test_cli import call

from kronfac.approximations import APPROXIMATIONS

SMALL = ["--examples", "6", "--threads", "1"]
FEW = [*SMALL, "--approximations", "kfac,diagonal"]


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["error", "nope"], "unknown problem 'nope'"),
        (["error", "digits-mlp", "--approximations", "kfacs"], "kfacs"),
        (["error", "digits-mlp", "--sources", "empirical", *FEW], "does not estimate the Gauss-Newton matrix"),
        (["error", "digits-mlp", "--layers", "9", *FEW], "There is no layer '9' with a curvature block"),
        (["error", "digits-mlp", "--examples", "9999"], "examples must be from 1 to the 1500"),
        (["error", "digits-mlp", "--damping", "0", *FEW], "damping must be positive"),
        (["error", "digits-mlp", "--memory-limit", "0.001", *FEW], "MiB. Use at most 1 examples"),
        (["error", "digits-mlp", "--train-steps", "1", "--set", "foo=1"], "adam has no hyper-parameter 'foo'"),
        (["matrices", "digits-mlp"], "Missing option '--layer'"),
        (["matrices", "digits-mlp", "--layer", "4", "--order", "diagonals", *FEW], "order='diagonals'"),
        (["matrices", "digits-mlp", "--layer", "0", "--memory-limit", "0.1", *FEW], "4160 x 4160 each, need"),
        (["training", "digits-mlp", "--every", "0"], "--every"),
        (["table", "--problems", "digits-mlp,nope"], "unknown problem 'nope'"),
        (["table", "--problems", "digits-mlp", "--sources", "forward_only"], "does not estimate"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    code, stdout, stderr = call("analyse", *arguments)
    assert code == 2
    assert stdout == ""
    assert stderr.startswith("kronfac: error: ")
    assert stderr.count("\n") == 1
    assert message in stderr


def test_error_prints_all_layers_and_each(tmp_path: Path) -> None:
    code, stdout, _ = call("analyse", "error", "digits-mlp", *FEW, "--train-steps", "2", "--out", str(tmp_path))
    assert code == 0
    assert "digits-mlp after 2 steps of adam, 6 examples: all layers" in stdout
    assert "error by layer, sampled source" in stdout
    rows = read(tmp_path / "error.csv")
    assert len(rows) == 2 * 2 * (3 + 1)
    assert all(float(row["error"]) > 0 for row in rows)
    assert (tmp_path / "error-exact.png").stat().st_size > 0


def test_error_as_json_of_one_layer_depends_on_training() -> None:
    arguments = ["analyse", "error", "digits-cnn", *FEW, "--sources", "exact", "--layers", "7", "--json"]
    code, stdout, _ = call(*arguments)
    assert code == 0
    rows = json.loads(stdout)
    assert [(row["layer"], row["approximation"]) for row in rows] == [
        (layer, name) for name in ("kfac", "diagonal") for layer in ("7", "*")
    ]
    assert rows[0]["error"] == pytest.approx(rows[1]["error"])
    trained = json.loads(call(*arguments, "--train-steps", "2", "--set", "lr=0.02")[1])
    assert trained[0]["error"] != rows[0]["error"]


def test_matrices_draws_a_row_for_each_layer(tmp_path: Path) -> None:
    arguments = ["--layer", "0", "--layer", "7", "--out", str(tmp_path), "--json"]
    code, stdout, _ = call("analyse", "matrices", "digits-cnn", *FEW, *arguments)
    assert code == 0
    content = json.loads(stdout)
    assert [(row["layer"], row["approximation"]) for row in content["errors"]] == [
        (layer, name) for layer in ("0", "7") for name in ("kfac", "diagonal")
    ]
    assert Path(content["picture"]).stat().st_size > 0


def test_training_follows_the_error(tmp_path: Path) -> None:
    code, stdout, _ = call(
        "analyse", "training", "digits-mlp", *FEW, "--steps", "3", "--every", "2", "--out", str(tmp_path)
    )
    assert code == 0
    assert "Frobenius errors of all layers" in stdout
    rows = read(tmp_path / "training.csv")
    assert [row["step"] for row in rows] == [step for step in ("0", "2", "3") for _ in range(2 * 4)]
    networks = [row for row in rows if row["layer"] == "*" and row["approximation"] == "kfac"]
    assert len({row["distance_sum"] for row in networks}) == 3
    assert (tmp_path / "training.png").stat().st_size > 0


def test_the_table_has_every_combination_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kronfac import analysis
    from kronfac.approximations.kfac import KFAC
    from kronfac.sources import Exact

    original, calls = KFAC.check, []

    def picky(self: KFAC, source: object) -> None:
        if isinstance(source, Exact):
            raise ValueError("kfac is picky today: no | exact source")
        original(self, source)  # type: ignore[arg-type]

    measure = analysis.approximation_error

    def counted(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(KFAC, "check", picky)
    monkeypatch.setattr(analysis, "approximation_error", counted)
    arguments = ["analyse", "table", "--problems", "digits-cnn", *FEW, "--train-steps", "2", "--out", str(tmp_path)]
    arguments += ["--sources", "exact,sampled"]
    assert call(*arguments)[0] == 130
    code, stdout, _ = call(*arguments)
    assert code == 0
    assert len(calls) == 3  # the part that was finished is not measured again
    text = (tmp_path / "approximation-error.md").read_text()
    assert text in stdout
    assert "| digits-cnn | none | kfac | refused (1) | – | – | – | " in text
    assert text.count("refused") == 2  # with the exact source, before and after training
    assert "1. kfac is picky today: no \\| exact source" in text
    assert text.count("| digits-cnn | none |") == text.count("| digits-cnn | 2 steps |") == 2
    rows = read(tmp_path / "approximation-error.csv")
    assert {(row["problem"], row["steps"]) for row in rows} == {("digits-cnn", "0"), ("digits-cnn", "2")}
    assert not (tmp_path / ".approximation-error").exists()


def test_all_means_every_registered_approximation() -> None:
    arguments = ["analyse", "error", "digits-mlp", *SMALL, "--layers", "4", "--sources", "exact", "--json"]
    rows = json.loads(call(*arguments)[1])
    assert {row["approximation"] for row in rows} == set(APPROXIMATIONS)
