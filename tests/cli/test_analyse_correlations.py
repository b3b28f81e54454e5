"""``kronfac analyse autocorrelation`` and ``locations``: files, rows and refusals, on the digits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kronfac.cli.main import app

SMALL = ["--steps", "3", "--examples", "40"]


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["analyse", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_autocorrelation_writes_pictures_and_numbers(tmp_path: Path) -> None:
    code, stdout, stderr = call("autocorrelation", "digits-cnn", *SMALL, "--out", str(tmp_path))
    assert code == 0, stderr
    assert "looking at step 3" in stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "autocorrelation.png",
        "autocorrelation.csv",
        "autocorrelation.npz",
        "cross-map.png",
    }
    assert "derivatives" in stdout
    assert str(tmp_path / "cross-map.png") in stdout
    with np.load(tmp_path / "autocorrelation.npz") as arrays:
        spatial = arrays["digits-cnn/activations/0/spatial"]
    assert spatial.shape == (1, 15, 15)
    assert spatial[0, 7, 7] == pytest.approx(1.0)
    assert len((tmp_path / "autocorrelation.csv").read_text().splitlines()) == stdout.count("digits-cnn") + 1


def test_autocorrelation_as_json(tmp_path: Path) -> None:
    arguments = ("autocorrelation", "digits-cnn", *SMALL, "--out", str(tmp_path), "--json")
    code, stdout, _ = call(*arguments)
    assert code == 0
    rows = json.loads(stdout)["rows"]
    assert {row["kind"] for row in rows} == {"activations", "derivatives"}
    assert all(0.0 <= row["distance 1"] <= 1.0 for row in rows)
    assert json.loads(call(*arguments)[1])["rows"] == rows, "a seed gives the same numbers"


def test_locations_write_a_picture_and_numbers(tmp_path: Path) -> None:
    code, stdout, stderr = call(
        "locations", "digits-cnn", "--steps", "0,2", "--examples", "20", "--entries", "5", "--out", str(tmp_path)
    )
    assert code == 0, stderr
    assert {path.name for path in tmp_path.iterdir()} == {"locations.png", "locations.csv", "locations.npz"}
    assert "looking at step 0" in stderr
    assert "looking at step 2" in stderr
    with np.load(tmp_path / "locations.npz") as arrays:
        assert arrays["2/0/trace"].shape == (64, 64)
    assert "trace, sampling" in stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["autocorrelation", "nope"], "unknown problem 'nope'"),
        (["autocorrelation", "digits-mlp"], "no convolution with trained parameters"),
        (["autocorrelation", "digits-cnn", "--optimizer", "foo"], "unknown optimiser 'foo'"),
        (["locations", "digits-cnn", "--layers", "7"], "layer '7' is no convolution"),
        (["locations", "digits-cnn", "--steps", "1,x"], "--steps must be whole numbers"),
        (["locations", "digits-cnn", "--steps", "3,1"], "rising"),
        (["locations", "digits-mlp"], "no convolution"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    steps = [] if "--steps" in arguments else ["--steps", "1"]
    code, stdout, stderr = call(*arguments, *steps, "--out", str(tmp_path))
    assert code == 2
    assert stdout == ""
    assert message in stderr.splitlines()[-1]
