"""``kronfac analyse alignment`` and ``damping``, on the embedded digits."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from tests.cli.calls import call

ALIGNMENT = ["analyse", "alignment", "digits-mlp", "--steps", "3", "--every", "2", "--examples", "40", "--threads", "1"]
DAMPING = ["analyse", "damping", "digits-cnn", "--steps", "3", "--every", "2", "--examples", "20", "--threads", "1"]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_alignment_writes_table_and_picture(tmp_path: Path) -> None:
    code, stdout, stderr = call(
        *ALIGNMENT, "--approximations", "kfac:exact,kfac:exact:factored", "--out", str(tmp_path)
    )
    assert code == 0, stderr
    assert (tmp_path / "alignment.png").read_bytes().startswith(b"\x89PNG")
    rows = read(tmp_path / "alignment.csv")
    assert {row["step"] for row in rows} == {"0", "2", "3"}
    assert {row["method"] for row in rows} == {"gradient", "block-diagonal", "kfac:exact", "kfac:exact:factored"}
    assert {row["layer"] for row in rows} == {"0", "2", "4", "all layers"}
    assert all(-1.0 <= float(row["cosine"]) <= 1.0 + 1e-9 and row["converged"] == "True" for row in rows)
    assert f"wrote {tmp_path / 'alignment.csv'}" in stdout
    assert "step 3" in stdout
    assert "\x1b" not in stdout + stderr


def test_alignment_as_json_and_the_same_again(tmp_path: Path) -> None:
    arguments = [*ALIGNMENT, "--approximations", "diagonal:exact", "--blocks-only", "--json"]
    code, first, stderr = call(*arguments, "--out", str(tmp_path / "a"))
    assert code == 0, stderr
    found = json.loads(first)
    assert found["problem"] == "digits-mlp"
    assert {row["reference"] for row in found["rows"]} == {"block-diagonal"}
    again = json.loads(call(*arguments, "--out", str(tmp_path / "b"))[1])
    assert again["rows"] == found["rows"]


def test_alignment_marks_what_did_not_converge(tmp_path: Path) -> None:
    arguments = [*ALIGNMENT, "--approximations", "kfac:sampled", "--max-iterations", "1", "--steps", "0"]
    code, stdout, stderr = call(*arguments, "--out", str(tmp_path))
    assert code == 0
    assert "warning: conjugate gradients did not reach 1e-05 in 1 iterations" in stderr
    assert " *" in stdout
    assert "False" in {row["converged"] for row in read(tmp_path / "alignment.csv")}


def test_damping_writes_table_and_pictures(tmp_path: Path) -> None:
    code, stdout, stderr = call(*DAMPING, "--out", str(tmp_path))
    assert code == 0, stderr
    rows = read(tmp_path / "damping.csv")
    assert {row["step"] for row in rows} == {"0", "2", "3"}
    assert {row["rule"] for row in rows} == {"factored", "exact"}
    for rule in ("factored", "exact"):
        assert (tmp_path / f"damping-{rule}.png").read_bytes().startswith(b"\x89PNG")
        assert f"digits-cnn: {rule} damping 0.003 after 3 steps" in stdout  # what the problem's KFAC uses


def test_damping_as_json(tmp_path: Path) -> None:
    code, stdout, stderr = call(
        *DAMPING, "--rules", "exact", "--damping", "0.5", "--layers", "0", "--json", "--out", str(tmp_path)
    )
    assert code == 0, stderr
    found = json.loads(stdout)
    assert found["damping"] == 0.5
    assert all(row["input_ratio"] is None for row in found["rows"])
    assert found["files"] == [str(tmp_path / "damping.csv"), str(tmp_path / "damping-exact.png")]


def test_a_rule_named_twice_is_measured_once(tmp_path: Path) -> None:
    code, stdout, stderr = call(*DAMPING, "--rules", "exact,exact", "--steps", "0", "--json", "--out", str(tmp_path))
    assert code == 0, stderr
    assert [row["layer"] for row in json.loads(stdout)["rows"]] == ["0", "3", "7"]


def test_the_restricted_rule_is_the_optimisers_own(tmp_path: Path) -> None:
    rule = ["--rules", "trace_restricted,normal", "--approximation", "tkfac"]
    code, plain, stderr = call(*DAMPING, *rule, "--json", "--out", str(tmp_path / "plain"))
    assert code == 0, stderr
    own = [*rule, "--optimizer", "tkfac", "--set", "scheme=trace_restricted", "--set", "nu=100"]
    code, text, stderr = call(*DAMPING, *own, "--json", "--out", str(tmp_path / "own"))
    assert code == 0, stderr
    assert "ν 0.01, β 1" in json.loads(plain)["rules"]["trace_restricted"]
    title = json.loads(text)["rules"]["trace_restricted"]
    assert "ν 100, β " in title
    assert "but for convolutions" in title
    rows = json.loads(text)["rows"]
    assert [row["layer"] for row in rows] == ["0", "3", "7"] * 6
    assert {row["rule"] for row in rows} == {"trace_restricted", "normal"}
    last = {row["layer"]: row for row in rows if row["step"] == 3 and row["rule"] == "trace_restricted"}
    for layer in ("0", "3"):  # a trace below ν is raised to it, and both factors are then doubled
        assert last[layer]["inflation"] == pytest.approx(4 * max(1, 100 / last[layer]["trace"]) - 1, rel=1e-4)
    assert last["7"]["inflation"] > 4 * max(1, 100 / last["7"]["trace"])  # expanded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["alignment", "nope"], "unknown problem 'nope'"),
        (["alignment", "digits-mlp", "--approximations", "kfac:nope"], "source='nope' is unknown"),
        (["alignment", "digits-mlp", "--approximations", "kfac,,"], "--approximations must be names"),
        (["alignment", "digits-mlp", "--damping", "0"], "--damping must be positive"),
        (["alignment", "digits-mlp", "--precision", "half"], "--precision must be double or single"),
        (["alignment", "digits-mlp", "--examples", "1000000"], "--examples must be at most"),
        (["alignment", "digits-mlp", "--tolerance", "2"], "tolerance must be"),
        (["alignment", "digits-mlp", "--every", "0"], "--every"),
        (["alignment", "digits-mlp", "--set", "kfac.lr=1"], "kfac has no hyper-parameter 'kfac.lr'"),
        (["alignment", "digits-mlp", "--optimizer", "nope"], "unknown optimiser 'nope'"),
        (["damping", "digits-mlp", "--rules", "nope"], "unknown damping rule 'nope'"),
        (["damping", "digits-mlp", "--damping", "-1"], "damping must be finite and not negative"),
        (["damping", "digits-mlp", "--layers", "9"], "the network has no 9"),
        (["damping", "digits-mlp", "--layers", "0,1"], "the network has no 1 with parameters; it has 0, 2, 4"),
        (["damping", "digits-mlp", "--approximation", "nope"], "approximation='nope' is unknown"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    code, stdout, stderr = call("analyse", *arguments, "--out", str(tmp_path / "out"))
    assert code == 2
    assert stdout == ""
    assert stderr.startswith("kronfac: error: ")
    assert stderr.count("\n") == 1
    assert message in stderr


def test_exit_code_1_if_the_training_diverges(tmp_path: Path) -> None:
    code, _, stderr = call(*DAMPING, "--optimizer", "sgd", "--set", "lr=1e20", "--out", str(tmp_path))
    assert code == 1
    assert "diverged at step" in stderr
    assert "--set" in stderr


@pytest.mark.parametrize("command", ["alignment", "damping"])
def test_help_teaches(command: str) -> None:
    code, stdout, _ = call("analyse", command, "--help")
    assert code == 0
    assert f"kronfac analyse {command} " in stdout
    assert "2017" in stdout or "2020" in stdout
