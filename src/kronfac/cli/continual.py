"""``kronfac continual``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from kronfac.cli.compare import this_command
from kronfac.cli.options import Fresh, Json, Out, assignments, by_optimizer, seed_numbers, words
from kronfac.cli.stream_display import stream_display
from kronfac.cli.stream_outcome import print_choices, print_summary
from kronfac.experiments import continual as learning
from kronfac.experiments.continual.balances import BALANCES
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.settings import MOST_THREADS

EPILOG = (
    "[bold]Streams[/bold]\n\n"
    + "\n\n".join(f"{s.name}: {s.description}" for s in learning.STREAMS.values())
    + "\n\n[bold]Strategies[/bold]\n\n"
    + "\n\n".join(
        f"{s.name}: {s.description}" + (f" (strength {s.strength:g})" if s.strength else "")
        for s in learning.STRATEGIES.values()
    )
    + "\n\nevery approximation of kronfac.approximations but kfac_tridiagonal, such as ekfac: a penalty for each task"
)

# One by default: networks and batches are so small that more threads cost more than they save.
Threads = Annotated[int, typer.Option(help="Torch threads.", max=MOST_THREADS, rich_help_panel="Machine")]


def continual(
    stream: Annotated[str, typer.Argument(help="Name of a stream of tasks, see the list below.", show_default=False)],
    strategies: Annotated[
        str, typer.Option(help="Names of strategies, with commas between them.")
    ] = "finetune,joint,l2,ewc,online-ewc,kfac",
    tasks: Annotated[int, typer.Option(help="Number of tasks.")] = 5,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between them: each is a run of every strategy.")] = "0",
    epochs: Annotated[
        int | None, typer.Option(help="Passes through each task's data; by default the stream's.", show_default=False)
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of Adam; by default the stream's.", show_default=False)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Batches of each task, instead of epochs.", show_default=False)
    ] = None,
    balance: Annotated[
        str,
        typer.Option(
            help="How penalties are weighed: "
            + "; ".join(f"{name}, {b.description}" for name, b in BALANCES.items())
            + ". "
            "A grid may have several, with commas between them."
        ),
    ] = "none",
    damping: Annotated[float, typer.Option(help="Added to every penalty's curvature.")] = 0.0,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change a strategy's strength, lr, damping or balance: --set ewc.strength=30. Repeatable.",
            show_default=False,
        ),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="Search instead: --grid lr=1e-3,3e-3 --grid damping=0,0.01. Every strategy is run with all "
            "combinations of lr, damping and strength on the first seed; what the newest tasks' held-out examples "
            "choose is shown, with its accuracy on all tasks.",
            show_default=False,
        ),
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(
            help="Training examples of each task held out, to choose by; by default a hundred in a grid, else none.",
            show_default=False,
        ),
    ] = None,
    slack: Annotated[
        float | None,
        typer.Option(
            help="Target accuracy that a grid gives for a stronger penalty, from 0 to 1; by default 0.01.",
            show_default=False,
        ),
    ] = None,
    out: Out = None,
    as_json: Json = False,
    fresh: Fresh = False,
    threads: Threads = 1,
) -> None:
    """Learn one task after the other with several strategies, and see what they remember.

    Every strategy starts from the same weights and sees the same tasks and batches. Stopped by Ctrl-C or killed, the
    same command goes on after the last task that was finished. A run that diverges is named and the others go on. The
    folder then holds accuracies as JSON lines, their matrices as a picture, and report.html, a page that needs nothing
    else.

    [dim]kronfac continual permuted-digits --strategies finetune,ewc,kfac --seeds 0,1,2 --out runs/permuted[/dim]
    """  # noqa: DOC501 - a person reads this as help
    names, place = words(strategies, "--strategies"), out or Path("runs") / stream
    chosen = by_optimizer(settings or [], "--set")
    common = {"out": place, "tasks": tasks, "fresh": fresh, "threads": threads, "command": this_command()}
    if grid:
        if chosen:
            raise ExperimentError("--set and --grid do not go together: a grid sets what it has as an axis")
        budget = learning.Budget(epochs, steps, lr, damping, held_out=100 if held_out is None else held_out)
        axes, balances = _axes(grid), words(balance, "--balance")
        with stream_display() as listener:
            found = learning.search(
                stream,
                names,
                axes,
                balances=balances,
                seed=seed_numbers(seeds)[0],
                budget=budget,
                slack=0.01 if slack is None else slack,
                listener=listener,
                **common,  # type: ignore[arg-type]
            )
        print_choices(found, as_text=not as_json)
        return
    if slack is not None:
        raise ExperimentError("--slack goes with --grid alone: without one nothing is chosen")
    budget = learning.Budget(epochs, steps, lr, damping, balance, held_out or 0)
    with stream_display() as listener:
        results = learning.compare(
            stream,
            names,
            seeds=seed_numbers(seeds),
            budget=budget,
            settings=chosen,
            listener=listener,
            **common,  # type: ignore[arg-type]
        )
    print_summary(results, as_text=not as_json)


def _axes(texts: Sequence[str]) -> dict[str, list[float]]:
    found = {}
    for name, values in assignments(texts, "--grid").items():
        try:
            found[name] = [float(value) for value in values.split(",")]
        except ValueError as error:
            raise ExperimentError(f"--grid must look like lr=0.001,0.003, got '{name}={values}'") from error
    return found
