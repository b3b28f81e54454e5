"""``kronfac report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kronfac import experiments
from kronfac.cli.options import Json
from kronfac.cli.outcome import print_outcome
from kronfac.cli.stream_outcome import is_stream, print_stream
from kronfac.experiments import continual
from kronfac.experiments.continual.points import ABOUT as GRID
from kronfac.experiments.continual.results import ABOUT as STRATEGIES
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.files import make_folder
from kronfac.experiments.results import COMPARISON


def report(
    folder: Annotated[
        Path, typer.Argument(help="A folder that train, compare, demo or continual wrote.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Draw the pictures and write report.html again from a folder of runs, finished or not."""
    if is_stream(folder):
        continual.write_report(make_folder(folder))
        print_stream(folder, as_text=not as_json)
        return
    if not (folder / COMPARISON).exists():
        files = f"{COMPARISON}, {STRATEGIES} or {GRID}"
        raise ExperimentError(f"{folder} holds no runs of kronfac: there is no file {files} in it")
    results = experiments.read_results(folder)
    make_folder(folder)
    experiments.write_report(results)
    print_outcome(results, as_text=not as_json)
