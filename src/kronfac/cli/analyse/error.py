"""``kronfac analyse error``: how far is every approximation from the exact curvature?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kronfac.cli.analyse.arguments import Problem
from kronfac.cli.analyse.work import (
    Approximations,
    Examples,
    MemoryLimit,
    Optimizer,
    Out,
    Samples,
    Seed,
    Settings,
    Threads,
    TrainSteps,
    chosen,
    one_line,
    threads_of,
    values_for,
    working,
    write_picture,
)
from kronfac.cli.display import print_table
from kronfac.cli.options import Json, words
from kronfac.experiments.files import make_folder, write_csv
from kronfac.experiments.present import Table
from kronfac.experiments.problems import get_problem
from kronfac.experiments.sources import named_sources
from kronfac.experiments.subject import train_subject, training_settings


def error(
    problem: Problem,
    approximations: Approximations = "all",
    sources: Annotated[
        str, typer.Option(help="Sources: exact, sampled, root, recursive, with commas.")
    ] = "exact,sampled",
    samples: Samples = 1,
    layers: Annotated[
        str | None, typer.Option(help="Layers to look at, with commas; all by default.", show_default=False)
    ] = None,
    examples: Examples = 128,
    damping: Annotated[
        float | None,
        typer.Option(
            help="λ of the updates, on the scale of the curvature; by default a tenth of its mean eigenvalue.",
            show_default=False,
        ),
    ] = None,
    norm: Annotated[str, typer.Option(help="Blocks of normalisation layers: unitwise or full.")] = "full",
    train_steps: TrainSteps = 0,
    optimizer: Optimizer = "adam",
    settings: Settings = None,
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
    memory_limit: MemoryLimit = 4.0,
    threads: Threads = None,
) -> None:
    """Compare approximations of the curvature with the exact Gauss-Newton matrix, layer by layer, in float64.

    [bold]error[/bold] is |Ĉ - C| / |C| in the Frobenius norm, [bold]trace[/bold] tr Ĉ / tr C, [bold]cosine[/bold]
    between the matrices, [bold]update[/bold] the cosine between (Ĉ + λI)⁻¹g and (C + λI)⁻¹g with the gradient g of the
    same examples, and [bold]full update[/bold] the same against the whole matrix, blocks between layers included.

    [dim]kronfac analyse error digits-mlp --train-steps 100[/dim]
    """
    from kronfac.analysis import NETWORK, approximation_error

    task = get_problem(problem)
    run = training_settings(task, optimizer, values_for(settings, train_steps), train_steps, seed)
    names, origins = chosen(approximations), named_sources(words(sources, "--sources"), samples)
    data = task.data()
    with threads_of(threads), one_line(), working(None) as work:
        subject = train_subject(
            task, run, data, train_steps, examples, lambda step, loss: work.begin(f"training, batch loss {loss:.4g}")
        )
        rows = approximation_error(
            subject.model,
            subject.likelihood,
            subject.batch,
            approximations=names,
            sources=origins,
            damping=damping,
            layers=None if layers is None else words(layers, "--layers"),
            norm=norm,
            seed=seed,
            memory_limit=int(memory_limit * 2**30),
            progress=work.begin,
        )
    files = [] if out is None else _write(make_folder(out), rows, problem)
    if as_json:
        print(json.dumps(rows, indent=2, allow_nan=False))
        return
    state = "at initialisation" if train_steps == 0 else f"after {train_steps} steps of {optimizer}"
    print_table(_networks(rows), f"{problem} {state}, {examples} examples: all layers")
    for source in dict.fromkeys(row["source"] for row in rows if row["layer"] != NETWORK):
        print()
        print_table(_layers(rows, source), f"error by layer, {source} source")
    for path in files:
        print(f"written: {path}")


def _networks(rows: Sequence[Mapping[str, Any]]) -> Table:
    cells: list[list[str]] = []
    marks: dict[int, str] = {}
    figures = ("error", "trace_ratio", "cosine", "update_cosine", "full_update_cosine")
    for row in (row for row in rows if row["layer"] == "*"):
        if row["refused"]:
            marks[len(cells)] = "bad"
        note = f"refused: {row['refused']}" if row["refused"] else row["note"]
        note = note if len(note) <= 90 else note[:87] + "..."
        cells.append([row["approximation"], row["source"], *(_number(row[key]) for key in figures), note])
    headings = ["approximation", "source", "error", "trace", "cosine", "update", "full update", ""]
    return Table(headings, cells, marks, words=(0, 1, 7))


def _layers(rows: Sequence[Mapping[str, Any]], source: str) -> Table:
    own = [row for row in rows if row["source"] == source and row["layer"] != "*"]
    names = list(dict.fromkeys(row["approximation"] for row in own))
    errors = {(row["layer"], row["approximation"]): row["error"] for row in own}
    sizes = {row["layer"]: row["parameters"] for row in own}
    cells = [
        [layer, str(size), *(_number(errors.get((layer, name))) for name in names)] for layer, size in sizes.items()
    ]
    return Table(["layer", "parameters", *names], cells)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _write(folder: Path, rows: list[dict[str, Any]], problem: str) -> list[Path]:
    from kronfac import plots
    from kronfac.analysis import to_frame

    write_csv(folder / "error.csv", rows)
    written = [folder / "error.csv"]
    frame = to_frame(rows)
    frame = frame[frame["layer"] != "*"]
    names = list(dict.fromkeys(frame["approximation"]))  # of all pictures: one colour each, whatever a source refuses
    for source in dict.fromkeys(frame["source"]):
        axes = plots.layer_errors(frame[frame["source"] == source], names=names, title=f"{problem}, {source} source")
        written.append(folder / f"error-{source}.png")
        write_picture(written[-1], axes)
    return written
