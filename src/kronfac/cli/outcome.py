"""What is printed when a comparison is over."""

from __future__ import annotations

import json

import typer

from kronfac.cli.display import print_table
from kronfac.experiments.present import grid_view, reach_view, settings_table, summary_view
from kronfac.experiments.report import REPORT, as_json
from kronfac.experiments.results import Results
from kronfac.experiments.tables import headlines
from kronfac.experiments.targets import target_view


def print_outcome(results: Results, as_text: bool) -> None:
    """Print a comparison's tables, headlines and files; or everything as JSON.

    Args:
        results: The comparison.
        as_text: Whether to print for people.

    Raises:
        typer.Exit: With code 1 if runs have ended and all of them diverged.
    """
    if not as_text:
        print(json.dumps(as_json(results), indent=2))
    else:
        print_table(settings_table(results), "Hyper-parameters")
        for name in results.grids:
            print()
            print_table(grid_view(results, name), f"{'Trials' if name in results.plan.tried else 'Grid'} of {name}")
        print()
        print_table(summary_view(results), f"{results.plan.problem}")
        if len(results.plan.optimizers) > 1:
            print()
            print_table(reach_view(results), "When each reaches what another has in the end")
        if results.plan.targets:
            print()
            print_table(target_view(results), "When each reaches a stated value")
        print()
        for line in headlines(results):
            print(line)
        print(f"report: {results.folder / REPORT}")
    if results.runs and all(run.status == "diverged" for run in results.runs):
        raise typer.Exit(1)
