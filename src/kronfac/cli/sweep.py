"""``kronfac sweep``."""

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
    Metric,
    Out,
    Seconds,
    Steps,
    Threads,
    by_optimizer,
    seed_numbers,
    words,
)
from kronfac.cli.outcome import print_outcome


def sweep(
    problem: ProblemName,
    optimizers: Annotated[
        str, typer.Option("--optimizers", "--optimisers", help="Optimisers to tune, with commas between them.")
    ] = "sgd,adam,kfac",
    trials: Annotated[int, typer.Option(help="Runs for each optimiser; the first has the problem's own values.")] = 20,
    ranges: Annotated[
        list[str] | None,
        typer.Option(
            "--range",
            help="Where to look: --range kfac.lr=0.01:1 (on a logarithmic scale where the ends are far apart) or "
            "--range kfac.damping_rule=factored,exact. Repeatable; by default learning rate and damping, from a "
            "thirtieth of the problem's own to thirty times it.",
            show_default=False,
        ),
    ] = None,
    trial_steps: Annotated[
        int | None, typer.Option(help="Steps of a trial; by default the whole budget.", show_default=False)
    ] = None,
    steps: Steps = None,
    epochs: Epochs = None,
    seconds: Seconds = None,
    evaluate_every: EvaluateEvery = None,
    seeds: Annotated[str, typer.Option(help="Trials take the first, the final runs all of them.")] = "0",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change a hyper-parameter: --set kfac.momentum=0.9. One that is searched begins with it. Repeatable.",
            show_default=False,
        ),
    ] = None,
    metric: Metric = None,
    out: Out = None,
    as_json: Json = False,
    fresh: Fresh = False,
    device: Device = "cpu",
    threads: Threads = None,
    checkpoint_every: CheckpointEvery = 5.0,
) -> None:
    """Tune optimisers on one problem with as many trials each, then compare the best, and report.

    The next values to try follow from the results of those before (Optuna's tree-structured Parzen estimator, after ten
    at random). With one seed the same values are tried again: stopped by Ctrl-C or killed, [bold]the same command goes
    on[/bold] where it was, and more --trials add to those that are done. A budget in seconds is one of wall-clock time
    for every optimiser alike.

    [dim]kronfac sweep digits-mlp --optimizers sgd,adam,kfac --trials 20 --seeds 0,1,2[/dim]

    [dim]kronfac sweep digits-mlp --optimizers kfac --range kfac.lr=0.01:1 --range kfac.kl_clip=0.001:0.1[/dim]
    """
    with progress_display() as display:
        axes = {
            name: {key: experiments.read_axis(text) for key, text in own.items()}
            for name, own in by_optimizer(ranges or [], "--range").items()
        }
        results = experiments.compare(
            problem,
            words(optimizers, "--optimizers"),
            out=out or Path("runs") / f"{problem}-sweep",
            steps=steps,
            epochs=epochs,
            seconds=seconds,
            seeds=seed_numbers(seeds),
            hyperparameters=by_optimizer(settings or [], "--set"),
            grid_steps=trial_steps,
            search=experiments.Search(trials, axes),
            metric=metric,
            evaluate_every=evaluate_every,
            device=device,
            threads=threads,
            progress=display,
            command=this_command(),
            fresh=fresh,
            checkpoint_every=checkpoint_every,
        )
    print_outcome(results, as_text=not as_json)
