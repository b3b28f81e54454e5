"""``kronfac train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kronfac import experiments
from kronfac.cli.compare import ProblemName, this_command
from kronfac.cli.display import progress_display
from kronfac.cli.options import (
    CheckpointEvery,
    Device,
    Epochs,
    EvaluateEvery,
    Fresh,
    Json,
    Out,
    Seconds,
    Steps,
    Threads,
    assignments,
)
from kronfac.cli.outcome import print_outcome
from kronfac.experiments.diagnostics import draw_diagnostics, write_tensorboard
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.optimizers import OPTIMIZERS, get_optimizer
from kronfac.experiments.settings import MAX_SEED


def train(
    problem: ProblemName,
    optimizer: Annotated[str, typer.Option("--optimizer", "--optimiser", help="Name of an optimiser.")] = "kfac",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a hyper-parameter: --set damping=0.1. Repeatable.", show_default=False),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Decides initial weights, the order of examples and sampled labels.", max=MAX_SEED)
    ] = 0,
    steps: Steps = None,
    epochs: Epochs = None,
    seconds: Seconds = None,
    evaluate_every: EvaluateEvery = None,
    out: Out = None,
    as_json: Json = False,
    fresh: Fresh = False,
    device: Device = "cpu",
    threads: Threads = None,
    checkpoint_every: CheckpointEvery = 5.0,
    diagnose: Annotated[
        bool,
        typer.Option(
            "--diagnose", help="Draw damping, step size, momentum and reduction ratio of a self-tuning optimiser."
        ),
    ] = False,
) -> None:
    """Train one problem with one optimiser.

    Hyper-parameters are those tuned for the problem unless you change them. Stopped by Ctrl-C or killed, the same
    command goes on where it was.

    [dim]kronfac train digits-mlp --optimizer kfac --set damping=0.01 --epochs 10[/dim]
    """  # noqa: DOC501 - a person reads this as help
    if diagnose and not get_optimizer(optimizer).closure:
        tuning = ", ".join(name for name, spec in OPTIMIZERS.items() if spec.closure)
        raise ExperimentError(f"--diagnose needs an optimiser that tunes itself ({tuning}), not {optimizer}")
    with progress_display() as display:
        results = experiments.compare(
            problem,
            [optimizer],
            out=out or Path("runs") / problem,
            steps=steps,
            epochs=epochs,
            seconds=seconds,
            seeds=[seed],
            hyperparameters={optimizer: assignments(settings or [], "--set")},
            evaluate_every=evaluate_every,
            device=device,
            threads=threads,
            progress=display,
            command=this_command(),
            fresh=fresh,
            checkpoint_every=checkpoint_every,
        )
    print_outcome(results, as_text=not as_json)
    if diagnose:
        for path in (*draw_diagnostics(results), write_tensorboard(results)):
            if path is not None:
                typer.echo(f"diagnostics: {path}", err=True)
