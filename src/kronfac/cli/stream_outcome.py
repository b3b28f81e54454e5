"""What is printed when a stream of tasks was learned."""

from __future__ import annotations

import json
from pathlib import Path

from kronfac.cli.display import print_table
from kronfac.experiments.continual.pictures import PICTURE, SCATTER
from kronfac.experiments.continual.points import ABOUT as GRID
from kronfac.experiments.continual.points import Grid, read_grid
from kronfac.experiments.continual.report import REPORT
from kronfac.experiments.continual.results import ABOUT as COMPARISON
from kronfac.experiments.continual.results import Failure, Results, read_results
from kronfac.experiments.continual.tables import choices, failures_view, summary


def print_summary(results: Results, as_text: bool) -> None:
    """Print what strategies remember, and where the files are.

    Args:
        results: The comparison.
        as_text: Whether to print for people; otherwise JSON.
    """
    if not as_text:
        print(json.dumps(results.lines(), indent=2))
        return
    print_table(summary(results), f"{results.stream}, {results.tasks} tasks")
    _print_ending(results.failures, results.folder, PICTURE)


def print_choices(grid: Grid, as_text: bool) -> None:
    """Print what the newest task chooses, and where the files are.

    Args:
        grid: All runs.
        as_text: Whether to print for people; otherwise JSON.
    """
    if not as_text:
        print(json.dumps(grid.lines(), indent=2))
        return
    print_table(choices(grid), f"{grid.stream}, {grid.tasks} tasks, chosen by the newest task")
    _print_ending(grid.failures, grid.folder, SCATTER)


def print_stream(folder: Path, as_text: bool) -> None:
    """Print what a folder of ``kronfac continual`` holds: the comparison if there is one, otherwise the search.

    Args:
        folder: The folder.
        as_text: Whether to print for people; otherwise JSON.
    """
    if (folder / COMPARISON).exists():
        print_summary(read_results(folder), as_text)
    else:
        print_choices(read_grid(folder), as_text)


def is_stream(folder: Path) -> bool:
    """Tell whether ``kronfac continual`` wrote a folder.

    Args:
        folder: The folder.

    Returns:
        Whether it did.
    """
    return (folder / COMPARISON).exists() or (folder / GRID).exists()


def _print_ending(failures: list[Failure], folder: Path, picture: str) -> None:
    if failures:
        print()
        print_table(failures_view(failures), "Runs that failed")
        print()
    print(f"picture: {folder / picture}")
    print(f"report: {folder / REPORT}")
