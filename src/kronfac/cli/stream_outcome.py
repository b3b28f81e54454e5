"""What is printed when a stream of tasks was learned."""

from __future__ import annotations

import json
from pathlib import Path

from kronfac.cli.display import print_table
from kronfac.experiments.continual.pictures import PICTURE, SCATTER
from kronfac.experiments.continual.points import ABOUT as GRID
from kronfac.experiments.continual.points import Grid
from kronfac.experiments.continual.report import REPORT, read_stream
from kronfac.experiments.continual.results import ABOUT as COMPARISON
from kronfac.experiments.continual.results import Results
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
    _print_ending(results, PICTURE)


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
    _print_ending(grid, SCATTER)


def print_stream(folder: Path, as_text: bool) -> None:
    """Print what a folder of ``kronfac continual`` holds: the comparison if a run of it is done, otherwise the search.

    Args:
        folder: The folder.
        as_text: Whether to print for people; otherwise JSON.
    """
    results, grid = read_stream(folder)
    if results is not None:
        print_summary(results, as_text)
    elif grid is not None:
        print_choices(grid, as_text)


def is_stream(folder: Path) -> bool:
    """Tell whether ``kronfac continual`` wrote a folder.

    Args:
        folder: The folder.

    Returns:
        Whether it did.
    """
    return (folder / COMPARISON).exists() or (folder / GRID).exists()


def _print_ending(one: Results | Grid, picture: str) -> None:
    if one.failures:
        print()
        print_table(failures_view(one.failures), "Runs that failed")
        print()
    if one.progress:
        print(one.progress)
    print(f"picture: {one.folder / picture}")
    print(f"report: {one.folder / REPORT}")
