"""Figures by command: each command is one that there is, and what was run is not run again."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import typer
from tests.cli.calls import call

from kronfac.cli.main import app
from kronfac.experiments.plan import make_plan
from kronfac.experiments.problems import PROBLEMS
from kronfac.experiments.reproduce.figures import FIGURES

COMMANDS = [
    pytest.param(words, id=f"{key}-{'small' if small else 'whole'}-{number}")
    for key, figure in FIGURES.items()
    for small in (False, True)
    for number, words in enumerate(figure.arguments(small))
]


def parsed(words: list[str]) -> dict[str, object]:
    """The parameters that a command would run with."""
    command, rest = typer.main.get_command(app), list(words)
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    return command.make_context("kronfac", rest).params


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_is_one_that_there_is(words: list[str]) -> None:
    values = parsed(words)
    named = values.get("problems") or ([values["problem"]] if "problem" in values else [])
    assert set(named) <= set(PROBLEMS)  # type: ignore[arg-type, call-overload]
    assert "out" in values  # which is where each is sent


@pytest.mark.parametrize("words", [p for p in COMMANDS if p.values[0][0] == "compare"])
def test_every_comparison_has_settings_that_its_optimisers_take(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []

    class Made(Exception):
        pass

    def stop(*arguments: object, **options: object) -> None:
        plans.append(make_plan(*arguments, **options))  # type: ignore[arg-type]
        raise Made

    # The package has a function of the module's name.
    monkeypatch.setattr(sys.modules["kronfac.experiments.compare"], "make_plan", stop)
    with pytest.raises(Made):
        typer.main.get_command(app).main([*words, "--out", os.devnull + "/no"], standalone_mode=False)
    assert plans[0].problem == words[1]


def test_a_figure_runs_once_and_says_what_it_is_held_against(tmp_path: Path) -> None:
    folder = tmp_path / "figure"
    arguments = ("reproduce", "figure", "gao-2", "--small", "--out", str(folder))
    code, out, err = call(*arguments, "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["figure"]["where"] == "Figure 2"
    assert len(list(folder.rglob("*.png"))) >= 1
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    code, out, _ = call(*arguments)
    assert code == 0
    assert "The paper: TKFAC's error is below K-FAC's throughout." in out
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


def test_a_command_that_fails_is_named_and_those_before_it_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    code, _, err = call("reproduce", "figure", "gao-1", "--small", "--out", str(tmp_path / "f"))
    assert code == 2
    assert "it ended with exit code 1: kronfac analyse matrices digits-mlp" in err


def test_figures_are_listed_and_unknown_ones_refused() -> None:
    code, out, _ = call("reproduce", "figures", "--json")
    assert code == 0
    assert [entry["key"] for entry in json.loads(out)] == list(FIGURES)
    assert "gao-6" in call("reproduce", "figures")[1]
    code, _, err = call("reproduce", "figure", "gao6")
    assert code == 2
    assert "gao-6" in err
    code, out, _ = call("reproduce", "figure", "gao-6", "--show")
    assert "--set tkfac.lr_drop_epochs=40" in out
