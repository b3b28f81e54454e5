"""The commands of ``kronfac``; a new one is one file and one line here."""

from __future__ import annotations

from typing import Annotated

import typer

import kronfac
from kronfac.cli import analyse, bench, compare, continual, demo, report, reproduce, sweep, train
from kronfac.cli.group import OneLineErrors
from kronfac.experiments.memory import keep_freed_memory

app = typer.Typer(
    cls=OneLineErrors,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("demo")(demo.demo)
app.command("train", epilog=compare.EPILOG)(train.train)
app.command("compare", epilog=compare.EPILOG)(compare.compare)
app.command("sweep", epilog=compare.EPILOG)(sweep.sweep)
app.command("continual", epilog=continual.EPILOG)(continual.continual)
app.command("bench")(bench.bench)
app.command("report")(report.report)
app.add_typer(analyse.app, name="analyse")
app.add_typer(reproduce.app, name="reproduce")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Kronecker-factored curvature for PyTorch: see it work, train with it, compare it, check it.

    Start with [bold]kronfac demo[/bold]; it takes about a minute and needs no network.
    """  # noqa: DOC501 - a person reads this as help
    if version:
        typer.echo(f"kronfac {kronfac.__version__}")
        raise typer.Exit
    if context.invoked_subcommand != "bench":  # which measures what a process of the user's meets, unless asked
        keep_freed_memory()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
