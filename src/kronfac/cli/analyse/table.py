"""``kronfac analyse table``: every approximation against the exact curvature, in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kronfac.cli.analyse.work import (
    Approximations,
    Examples,
    MemoryLimit,
    Optimizer,
    Samples,
    Seed,
    Threads,
    chosen,
    one_line,
    threads_of,
    working,
)
from kronfac.cli.compare import this_command
from kronfac.cli.options import Json, words
from kronfac.experiments.approximation_table import PROBLEMS, TableSettings, markdown, measure_table, write_table
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.files import make_folder
from kronfac.experiments.lock import locked
from kronfac.experiments.problems import get_problem
from kronfac.experiments.sources import named_sources
from kronfac.experiments.subject import training_settings


def table(
    out: Annotated[Path, typer.Option(help="Folder for the table.")] = Path("runs") / "analyse-table",
    problems: Annotated[str, typer.Option(help="Problems, with commas between them.")] = ",".join(PROBLEMS),
    approximations: Approximations = "all",
    sources: Annotated[
        str, typer.Option(help="Sources with commas between them, or all that estimate the exact matrix.")
    ] = "all",
    samples: Samples = 1,
    examples: Examples = 128,
    train_steps: Annotated[int, typer.Option(help="Steps of training of the second half of the table.", min=1)] = 500,
    optimizer: Optimizer = "adam",
    seed: Seed = 0,
    as_json: Json = False,
    memory_limit: MemoryLimit = 4.0,
    threads: Threads = None,
) -> None:
    """Compare every approximation and source with the exact curvature of several networks, before and after training.

    Writes approximation-error.md, whose figures are over all layers together, and approximation-error.csv with every
    layer's. Refused combinations are in it with the reason. Stopped, [bold]the same command goes on[/bold] with the
    problems that are left. The default problems need MNIST and CIFAR-10.

    [dim]kronfac analyse table --problems digits-mlp,digits-cnn --out runs/table[/dim]
    """  # noqa: DOC501 - a person reads this as help
    from kronfac.analysis.scene import methods_of, sources_of

    names = words(problems, "--problems")
    if len(set(names)) < len(names):
        raise ExperimentError(f"--problems names one twice: {problems}")
    for name in names:
        training_settings(get_problem(name), optimizer, {}, train_steps, seed)
    with one_line():
        methods = methods_of(chosen(approximations))
        origins = sources_of(None if sources == "all" else named_sources(words(sources, "--sources"), samples), samples)
    settings = TableSettings(
        tuple(names),
        tuple(method.name for method in methods),
        tuple(source.name for source in origins),
        samples,
        examples,
        train_steps,
        optimizer,
        seed,
    )
    folder = make_folder(out)
    total = len(names) * (train_steps + 2 * len(methods) * len(origins))
    command = this_command()
    with locked(folder):
        with threads_of(threads), one_line(), working(total) as work:
            rows = measure_table(settings, folder, work.begin, int(memory_limit * 2**30))
        written = write_table(settings, rows, folder, command)
    if as_json:
        print(json.dumps(rows, indent=2, allow_nan=False))
        return
    print(markdown(settings, rows, command))
    for path in written:
        print(f"written: {path}")
