"""``kronfac reproduce figures`` and ``kronfac reproduce figure``."""

from __future__ import annotations

import itertools
import json
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kronfac.cli.display import print_table
from kronfac.cli.group import INTERRUPTED
from kronfac.cli.options import Json, Out
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.files import make_folder, read_json, write_json
from kronfac.experiments.lock import locked
from kronfac.experiments.present import Table
from kronfac.experiments.reproduce.figures import FIGURES, Figure, get_figure

EPILOG = "[bold]Figures[/bold]\n\n" + "\n\n".join(
    f"{figure.key}: {figure.paper}, {figure.where}: {figure.shows}" for figure in FIGURES.values()
)
_DONE = "commands.json"


def figures(as_json: Json = False) -> None:
    """List the figures of the papers that can be made again."""
    if as_json:
        print(json.dumps([asdict(figure) for figure in FIGURES.values()], indent=2))
        return
    rows = [[figure.key, figure.paper, figure.where, figure.shows] for figure in FIGURES.values()]
    print_table(Table(["figure", "paper", "where", "what it shows"], rows, words=(0, 1, 2, 3)))
    print("kronfac reproduce figure KEY makes one; --show says how, and what the paper found")


def figure(
    key: Annotated[str, typer.Argument(help="Which figure, see the list below.", show_default=False)],
    show: Annotated[
        bool, typer.Option("--show", help="Run nothing: say what the paper found, what differs, and the commands.")
    ] = False,
    small: Annotated[
        bool, typer.Option("--small", help="On the offline digits, in seconds: to see what comes out.")
    ] = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Make a figure of a paper again: run the commands that it takes, one after the other.

    They have the paper's settings and take its time, [bold]from minutes to days[/bold] on a few cores: --show prints
    them, to change what you like. Stopped by Ctrl-C, the same command goes on.

    [dim]kronfac reproduce figure gao-2 --small[/dim]
    """
    chosen = get_figure(key)
    folder = out or Path("runs") / "figures" / (f"{key}-small" if small else key)
    commands = _with_folders(chosen, small, folder)
    if not show:
        _run(commands, folder, quiet=as_json)
    if as_json:
        lines = [shlex.join(command) for command in commands]
        print(json.dumps({"figure": asdict(chosen), "folder": str(folder), "commands": lines}, indent=2))
        return
    print(f"{chosen.paper}, {chosen.where}: {chosen.shows}")
    print(f"The paper: {chosen.found}.")
    print(f"Ours: {'on the offline digits, no comparison; ' if small else ''}{chosen.differs}.")
    for command in commands:
        print(shlex.join(["kronfac", *command]))


def _with_folders(chosen: Figure, small: bool, folder: Path) -> list[list[str]]:
    """The commands, each with a folder of its own."""
    commands = []
    for number, words in enumerate(chosen.arguments(small), start=1):
        named = itertools.takewhile(lambda word: not word.startswith("-"), words)
        commands.append([*words, "--out", str(folder / "-".join([str(number), *named]))])
    return commands


def _run(commands: list[list[str]], folder: Path, quiet: bool) -> None:
    """Run those that have not been, each in a process of its own, as somebody would by hand."""
    make_folder(folder)
    with locked(folder):
        done = read_json(folder / _DONE).get("done", []) if (folder / _DONE).exists() else []
        for command in commands:
            line = shlex.join(command)
            if line in done:  # type: ignore[operator]
                continue
            print(f"kronfac {line}", file=sys.stderr)
            program = [sys.executable, "-m", "kronfac.cli", *command]
            code = subprocess.run(program, stdout=subprocess.DEVNULL if quiet else None, check=False).returncode
            if code == INTERRUPTED:
                raise KeyboardInterrupt
            if code:
                raise ExperimentError(f"it ended with exit code {code}: kronfac {line}")
            done = [*done, line]  # type: ignore[misc]
            write_json(folder / _DONE, {"done": done})
