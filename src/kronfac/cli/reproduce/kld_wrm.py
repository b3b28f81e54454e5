"""``kronfac reproduce kld-wrm``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kronfac.cli.compare import this_command
from kronfac.cli.display import print_table
from kronfac.cli.options import Device, Json, Out, words
from kronfac.cli.reproduce.progress import study_display
from kronfac.experiments.files import without_nan
from kronfac.experiments.reproduce import kld_wrm as study

EPILOG = "[bold]Rows[/bold]\n\n" + "\n\n".join(f"{row.key}: {row.title}" for row in study.ROWS.values())


def kld_wrm(
    rows: Annotated[
        str,
        typer.Option(
            help="Rows of the table, see the list below; best: that of each solver in the main text; all; or solvers: "
            "kfac, so, q, qe. With commas between them."
        ),
    ] = "all",
    runs: Annotated[int, typer.Option(help="Runs of each row, with the seeds 0, 1, …")] = 10,
    epochs: Annotated[int, typer.Option(help="Passes through the training set.")] = 50,
    data: Annotated[str, typer.Option(help="mnist; or digits, to try it without a download.")] = "mnist",
    workers: Annotated[
        int | None,
        typer.Option(help="Processes of one thread each; by default one for each core.", show_default=False),
    ] = None,
    device: Device = "cpu",
    out: Out = None,
    table_only: Annotated[
        bool, typer.Option("--table-only", help="Train nothing: table and pictures of the finished runs.")
    ] = False,
    known: Annotated[
        Path | None,
        typer.Option(help="A runs.csv that this command wrote: runs in it are not trained again.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare K-FAC with SO-, Q- and QE-KLD-WRM on MNIST as Puiu (2022) did: its Table 1 and figures.

    Stopped by Ctrl-C or killed, [bold]the same command goes on[/bold] where each run was; with more rows or runs it
    adds theirs. The folder then holds table.md, table.csv, runs.csv, accuracy.png, loss.png and a picture for each
    solver.
    A step of QE costs about ten of the others: its rows take most of the time.

    [dim]kronfac reproduce kld-wrm --rows best --runs 3 --out runs/kld-wrm[/dim]
    """
    chosen = study.make_study(words(rows, "--rows"), runs, epochs, data, device)
    names = [f"{study.ROWS[key].title}, run {seed}" for seed in range(runs) for key in chosen.rows]
    with study_display(names) as listener:
        outcome = study.reproduce(
            chosen.rows,
            out=out or Path("runs") / "kld-wrm",
            runs=runs,
            epochs=epochs,
            data=data,
            device=device,
            workers=workers,
            table_only=table_only,
            known=known,
            command=this_command(),
            listener=listener,
        )
    if as_json:
        rows_found = [without_nan(row) for row in study.as_rows(outcome.summaries)]
        print(json.dumps({"folder": str(outcome.folder), "epochs": epochs, "data": data, "rows": rows_found}, indent=2))
        return
    print_table(study.view(outcome.summaries), f"Puiu (2022), Table 1: ours (paper's); {data}, {epochs} epochs")
    print(f"table and pictures: {outcome.folder}")
