"""``kronfac reproduce``: studies of the source papers, run again. A new one is one file and one line here."""

from __future__ import annotations

import typer

from kronfac.cli.reproduce import kld_wrm

app = typer.Typer(
    help="Run a study of a paper again, and put its figures beside ours.",
    rich_markup_mode="rich",
)
app.command("kld-wrm", epilog=kld_wrm.EPILOG)(kld_wrm.kld_wrm)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
