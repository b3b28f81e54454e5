from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.calls import call

from kronfac import experiments
from kronfac.sources import Recursive

SMALL = ["--steps", "20", "--threads", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "nope"], "unknown problem 'nope'; known: digits-autoencoder"),
        (["compare", "digits-mlp", "--optimizers", "sgd,foo"], "unknown optimiser 'foo'"),
        (["compare", "digits-mlp", "--optimizers", "sgd,,adam"], "--optimizers must be names"),
        (
            ["compare", "digits-mlp", "--optimizers", "sgd", "--set", "sgd.lr=-1"],
            "sgd.lr must be a number above 0, got '-1'",
        ),
        (["compare", "digits-mlp", "--set", "lr=1"], "--set takes optimiser.name=value"),
        (["compare", "digits-mlp", "--set", "sgd.lr"], "--set takes name=value, got 'sgd.lr'"),
        (["compare", "digits-mlp", "--set", "sgd.lr=1", "--set", "sgd.lr=2"], "--set gives sgd.lr twice"),
        (["compare", "digits-mlp", "--grid", "sgd.foo=1,2"], "sgd has no hyper-parameter 'foo'"),
        (["compare", "digits-mlp", "--seeds", "0,x"], "--seeds must be whole numbers"),
        (["compare", "digits-mlp", "--steps", "0"], "steps must be"),
        (["compare", "digits-mlp", "--steps", "many"], "--steps"),
        (["compare", "digits-mlp", "--metric", "beauty"], "unknown metric"),
        (["compare", "digits-mlp", "--bogus"], "No such option"),
        (["compare", "digits-mlp", "--threads", "100000"], "'--threads'"),
        (["bench", "--threads", "100000"], "'--threads'"),
        (["continual", "permuted-digits", "--threads", "100000"], "'--threads'"),
        (["analyse", "error", "digits-mlp", "--threads", "100000"], "'--threads'"),
        (["demo", "--threads", "100000"], "'--threads'"),
        (["compare"], "Missing argument"),
        (["train", "digits-mlp", "--optimizer", "sgd", "--set", "damping=1"], "sgd has no hyper-parameter 'damping'"),
        (["train", "digits-mlp", "--seed", "-1"], "seed must be"),
        (
            ["train", "digits-mlp", "--checkpoint-every", "nan"],
            "--checkpoint-every must be a number of at least 0, got nan",
        ),
        (
            ["compare", "digits-mlp", "--checkpoint-every=-1"],
            "--checkpoint-every must be a number of at least 0, got -1",
        ),
        (["train", "digits-mlp", "--epochs", "1e300"], "epochs must be a number above 0 and at most 1e+12, got 1e+300"),
        (["train", "digits-mlp", "--steps", "9" * 20], "steps must be a whole number of at least 1 and at most 10"),
        (["compare", "digits-mlp", "--grid-steps", "9" * 20], "grid_steps must be a whole number of at least 1"),
        (["train", "digits-mlp", "--set", "warm_up=1e300"], "kfac.warm_up must be a whole number"),
        (["compare", "digits-mlp", "--grid-steps", "2"], "grid_steps=2 is the budget of a grid's runs"),
        (
            ["compare", "digits-mlp", "--set", "sgd.lr=0.3", "--grid", "sgd.lr=0.1,0.2"],
            "sgd.lr is both set to 0.3 and in the grid: give one of them",
        ),
        (["compare", "digits-mlp", "--grid", "sgd.lr=0.1,1e-1"], "the grid of sgd names a value twice"),
        (["train", "digits-mlp", "--set", "final_lr=0.5"], "kfac.final_lr has no effect with schedule=constant"),
        (
            ["train", "digits-mlp", "--optimizer", "tkfac", "--set", "nu=1"],
            "tkfac.nu has no effect with scheme=normal",
        ),
        (
            ["train", "digits-mlp", "--set", "damping=1", "--set", "factor_damping=1"],
            "kfac.factor_damping takes the place of kfac.damping: give one of them",
        ),
        (
            ["analyse", "error", "digits-mlp", "--set", "lr=1"],
            "--set lr=1 has no effect: there are no steps of training",
        ),
        (
            ["analyse", "damping", "digits-mlp", "--optimizer", "adaptive_kfac", "--steps", "0"],
            "adaptive_kfac chooses its damping while it trains: say with --damping what to look at",
        ),
        (["analyse", "table", "--problems", "digits-mlp,digits-mlp"], "--problems names one twice"),
        (["analyse", "error", "digits-mlp", "--memory-limit", "1e300"], "'--memory-limit'"),
        (["analyse", "error", "digits-mlp", "--approximations", "kfac,kfac"], "--approximations names one twice"),
        (["analyse", "alignment", "digits-mlp", "--approximations", "kfac,kfac"], "--approximations names one twice"),
        (["analyse", "verify", "digits-mlp", "--scale", "nan"], "--scale must be a number of at least 0, got nan"),
        (["sweep", "digits-mlp", "--range", "sgd.lr=0.1,1e-1"], "a value to choose from is named twice"),
        (["bench", "--workloads", "kfc,kfc"], "--workloads names one twice"),
        (["bench", "--workloads", "kfc", "--parts", "--only", "step"], "--parts leaves training steps out"),
        (["bench", "--scaling", "width", "--parts"], "leave --workloads and --parts out"),
        (["train", "digits-mpl"], "; did you mean digits-mlp?"),
        (["train", "digits-mlp", "--optimizer", "adma"], "; did you mean adam?"),
        (["train", "digits-mlp", "--set", "dampign=1"], "; did you mean damping?"),
        (["train", "digits-mlp", "--set", "source=rot"], "kfac.source must be one of sampled, exact, empirical"),
        (["analyse", "verify", "digits-mlp", "--source", "rot"], "unknown source 'rot'; known: sampled"),
        (["analyse", "verify", "digits-mlp", "--examples", "2000"], "examples must be from 1 to the 1500"),
        (["analyse", "rank", "digits-mlp", "--examples", "2000"], "examples must be from 1 to the 1500"),
        (["analyse", "spectrum", "digits-mlp", "--examples", "2000"], "examples must be from 1 to the 1500"),
        (["report", "/nowhere"], "holds no runs of kronfac"),
        (["bogus"], "No such command 'bogus'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")] if arguments[0] in {"compare", "train"} else []
    code, stdout, stderr = call(*arguments, *out)
    assert code == 2
    assert stdout == ""
    assert stderr.startswith("kronfac: error: ")
    assert stderr.count("\n") == 1
    assert message in stderr
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, stderr = call("train", "digits-mlp", "--optimizer", "sgd", *SMALL, "--out", str(tmp_path / "file"))
    assert code == 2
    assert f"cannot write to {tmp_path / 'file'}" in stderr


def test_what_the_optimiser_refuses_in_training_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recursive.__init__, "__defaults__", (1000,))
    settings = ["--optimizer", "kfac", "--set", "source=recursive"]
    code, _, stderr = call("train", "digits-cnn", *settings, *SMALL, "--out", str(tmp_path))
    assert code == 2
    assert "kronfac: error: kfac on digits-cnn: source='recursive' keeps a matrix" in stderr
    assert "layer '0', with outputs (16, 8, 8)" in stderr


def test_a_missing_dataset_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KRONFAC_DATA", str(tmp_path))
    code, _, stderr = call("train", "mnist-autoencoder", "--optimizer", "sgd", "--out", str(tmp_path / "out"))
    assert code == 2
    assert "ylecun/mnist" in stderr
    assert "KRONFAC_DATA" in stderr


def test_a_corrupt_checkpoint_is_named_and_left(tmp_path: Path) -> None:
    arguments = ["train", "digits-mlp", "--optimizer", "sgd", *SMALL, "--out", str(tmp_path)]
    assert call(*arguments)[0] == 0
    folder = next((tmp_path / "runs").iterdir())
    (folder / "result.json").unlink()
    (folder / "checkpoint.pt").write_bytes(b"rubbish")
    code, _, stderr = call(*arguments)
    assert code == 2
    assert f"checkpoint {folder / 'checkpoint.pt'} cannot be read; delete it" in stderr
    assert (folder / "checkpoint.pt").read_bytes() == b"rubbish"


def test_compare_prints_tables_and_plain_lines(tmp_path: Path) -> None:
    code, stdout, stderr = call("compare", "digits-mlp", "--optimizers", "sgd,adam", *SMALL, "--out", str(tmp_path))
    assert code == 0
    assert "SGD-momentum" in stdout
    assert "When each reaches what another has in the end" in stdout
    assert f"report: {tmp_path / 'report.html'}" in stdout
    assert "[2/2] adam" in stderr
    assert "\x1b" not in stdout + stderr
    assert call("report", str(tmp_path))[1] == stdout


def test_json_alone_on_standard_output(tmp_path: Path) -> None:
    arguments = ["compare", "digits-mlp", "--optimizers", "sgd", "--grid", "sgd.lr=0.01,0.1", *SMALL]
    code, stdout, _ = call(*arguments, "--out", str(tmp_path), "--json")
    assert code == 0
    content = json.loads(stdout)
    assert content["summary"][0]["status"] == "done"
    assert content["chosen"]["sgd"]["lr"] in (0.01, 0.1)
    assert content == json.loads((tmp_path / "summary.json").read_text())


def test_train_is_a_comparison_of_one(tmp_path: Path) -> None:
    arguments = ["--optimiser", "adam", "--set", "lr=0.01", "--seed", "3", *SMALL, "--out", str(tmp_path)]
    code, stdout, _ = call("train", "digits-mlp", *arguments)
    assert code == 0
    assert "lr=0.01" in stdout
    assert (tmp_path / "report.html").exists()


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "compare", interrupted)
    code, _, stderr = call("train", "digits-mlp", *SMALL, "--out", str(tmp_path))
    assert code == 130
    assert "the same command goes on from the last checkpoint" in stderr


def test_exit_code_1_if_everything_diverged(tmp_path: Path) -> None:
    arguments = ["--optimizer", "sgd", "--set", "lr=1e20", *SMALL, "--out", str(tmp_path)]
    code, stdout, stderr = call("train", "digits-mlp", *arguments)
    assert code == 1
    assert "diverged at step" in stderr
    assert "diverged" in stdout


@pytest.mark.parametrize("command", [[], ["demo"], ["train"], ["compare"], ["report"], ["analyse"]])
def test_help_teaches(command: list[str]) -> None:
    code, stdout, _ = call(*command, "--help")
    assert code == 0
    assert "Usage: " in stdout
    if command in (["train"], ["compare"]):
        assert "digits-autoencoder" in stdout
        assert "damping" in stdout


def test_without_arguments_the_help_is_shown_and_the_version_on_demand() -> None:
    assert "Usage: " in call()[1]
    assert call("--version")[1].startswith("kronfac 0.")


def test_a_missing_library_is_one_line() -> None:
    script = "import sys; sys.modules['typer'] = None; from kronfac.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'kronfac[experiments]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    heavy = ["pandas", "matplotlib", "plotly", "pyarrow", "PIL", "huggingface_hub", "sklearn"]
    script = f"import sys, kronfac.cli.app; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    script = "import sys, kronfac; print([m for m in ('typer', 'rich', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
