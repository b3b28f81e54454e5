"""``kronfac reproduce``: studies of the source papers, run again. A new one is one file and one line here."""

from __future__ import annotations

import typer

from kronfac.cli.reproduce import figures, kld_wrm

app = typer.Typer(
    help="Run what the source papers did again, and put their figures beside ours.",
    rich_markup_mode="rich",
)
app.command("figures")(figures.figures)
app.command("figure", epilog=figures.EPILOG)(figures.figure)
app.command("kld-wrm", epilog=kld_wrm.EPILOG)(kld_wrm.kld_wrm)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
