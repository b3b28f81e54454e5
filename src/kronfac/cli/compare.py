"""``kronfac compare``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from kronfac import experiments
from kronfac.cli import lists
from kronfac.cli.display import progress_display
from kronfac.cli.options import (
    CheckpointEvery,
    Device,
    Epochs,
    EvaluateEvery,
    Fresh,
    Json,
    Metric,
    Out,
    Seconds,
    Steps,
    Threads,
    by_optimizer,
    numbers,
    seed_numbers,
    words,
)
from kronfac.cli.outcome import print_outcome

#: Below the help of every command that takes a problem and optimisers.
EPILOG = f"{lists.problems()}\n\n{lists.optimizers()}"
ProblemName = Annotated[str, typer.Argument(help="Name of a problem, see the list below.", show_default=False)]


def compare(
    problem: ProblemName,
    optimizers: Annotated[
        str, typer.Option("--optimizers", "--optimisers", help="Optimisers to compare, with commas between them.")
    ] = "sgd,adam,kfac",
    steps: Steps = None,
    epochs: Epochs = None,
    seconds: Seconds = None,
    evaluate_every: EvaluateEvery = None,
    seeds: Annotated[str, typer.Option(help="One run of each optimiser per seed.")] = "0",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a hyper-parameter: --set kfac.damping=0.1. Repeatable.", show_default=False),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="Tune first: --grid sgd.lr=0.01,0.03,0.1. Repeatable; every combination of an optimiser's values is "
            "run with the first seed, and the best at the end is used.",
            show_default=False,
        ),
    ] = None,
    grid_steps: Annotated[
        int | None, typer.Option(help="Steps of a tuning run; by default the whole budget.", show_default=False)
    ] = None,
    metric: Metric = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Values of the metric with commas between them: a table says in how many steps and seconds each "
            "optimiser reaches them.",
            show_default=False,
        ),
    ] = None,
    out: Out = None,
    as_json: Json = False,
    fresh: Fresh = False,
    device: Device = "cpu",
    threads: Threads = None,
    checkpoint_every: CheckpointEvery = 5.0,
) -> None:
    """Train one problem with several optimisers under the same budget, and report.

    Every optimiser starts from the same weights, sees the same batches and uses hyper-parameters tuned for the problem
    unless you change them. Stopped by Ctrl-C or killed, [bold]the same command goes on[/bold] where it was; with
    more optimisers or seeds it adds their runs. The folder then holds metrics as JSON lines, pictures,
    and report.html, a page that needs nothing else.

    [dim]kronfac compare digits-autoencoder --optimizers sgd,adam,kfac --steps 500 --out runs/digits[/dim]

    [dim]kronfac compare mnist-autoencoder --optimizers sgd,adamw,soap,kfac --seconds 120 --target 6,4[/dim]
    """
    with progress_display() as display:
        results = experiments.compare(
            problem,
            words(optimizers, "--optimizers"),
            out=out or Path("runs") / problem,
            steps=steps,
            epochs=epochs,
            seconds=seconds,
            seeds=seed_numbers(seeds),
            hyperparameters=by_optimizer(settings or [], "--set"),
            grid={
                name: {key: words(values, "--grid") for key, values in axes.items()}
                for name, axes in by_optimizer(grid or [], "--grid").items()
            },
            grid_steps=grid_steps,
            metric=metric,
            targets=[] if target is None else numbers(target, "--target"),
            evaluate_every=evaluate_every,
            device=device,
            threads=threads,
            progress=display,
            command=this_command(),
            fresh=fresh,
            checkpoint_every=checkpoint_every,
        )
    print_outcome(results, as_text=not as_json)


def this_command() -> str:
    """Write down how this process was called.

    Returns:
        ``kronfac ...``, quoted for a shell.
    """
    return shlex.join(["kronfac", *sys.argv[1:]])
