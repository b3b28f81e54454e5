"""``kronfac analyse``: is the curvature of a problem's network what it should be, and what do approximations lose?

A new analysis is one file with a command, and one line here.
"""

from __future__ import annotations

import typer

from kronfac.cli.analyse import (
    alignment,
    autocorrelation,
    coverage,
    damping,
    error,
    error_training,
    locations,
    matrices,
    rank,
    spectrum,
    table,
    verify,
)

app = typer.Typer(
    help="Look at the curvature of a problem's network: what each parameter gets, and whether it is right.",
    rich_markup_mode="rich",
)
app.command("alignment")(alignment.alignment)
app.command("coverage")(coverage.coverage)
app.command("error")(error.error)
app.command("matrices")(matrices.matrices)
app.command("table")(table.table)
app.command("training")(error_training.training)
app.command("spectrum")(spectrum.spectrum)
app.command("rank")(rank.rank)
app.command("damping")(damping.damping)
app.command("verify")(verify.verify)
app.command("autocorrelation")(autocorrelation.autocorrelation)
app.command("locations")(locations.locations)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
