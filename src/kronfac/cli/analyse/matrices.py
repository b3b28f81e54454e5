"""``kronfac analyse matrices``: exact blocks, approximations and their errors as images."""

from __future__ import annotations

import json
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
from kronfac.cli.options import Json
from kronfac.experiments.files import make_folder
from kronfac.experiments.problems import get_problem
from kronfac.experiments.sources import named_source
from kronfac.experiments.subject import train_subject, training_settings


def matrices(
    problem: Problem,
    layer: Annotated[
        list[str],
        typer.Option(
            help="Name of a layer, as kronfac analyse coverage lists them. Repeatable: a row of images each.",
            show_default=False,
        ),
    ],
    approximations: Approximations = "kfac",
    source: Annotated[str, typer.Option(help="Source of the approximations: exact, sampled or root.")] = "exact",
    samples: Samples = 1,
    examples: Examples = 128,
    with_bias: Annotated[bool, typer.Option("--with-bias", help="Show the bias's rows and columns too.")] = False,
    order: Annotated[
        str, typer.Option(help="Order of the entries of [W b]: columns first, as in the papers, or rows.")
    ] = "columns",
    train_steps: TrainSteps = 0,
    optimizer: Optimizer = "adam",
    settings: Settings = None,
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
    memory_limit: MemoryLimit = 4.0,
    threads: Threads = None,
) -> None:
    """Draw a layer's exact curvature, its approximations, and the errors, on one scale for each layer.

    Figure 1 of Gao et al. (2020), for any approximation. Writes matrices.png to runs/analyse-<problem> unless --out
    says otherwise.

    [dim]kronfac analyse matrices digits-mlp --layer 2 --approximations kfac,diagonal --train-steps 100[/dim]
    """
    from kronfac import analysis
    from kronfac.approximations import APPROXIMATIONS

    task, origin = get_problem(problem), named_source(source, samples)
    run = training_settings(task, optimizer, values_for(settings, train_steps), train_steps, seed)
    names = chosen(approximations) or list(APPROXIMATIONS)
    data = task.data()
    with threads_of(threads), one_line(), working(None) as work:
        subject = train_subject(
            task, run, data, train_steps, examples, lambda step, loss: work.begin(f"training, batch loss {loss:.4g}")
        )
        found = []
        for name in layer:
            work.begin(f"layer {name}")
            found.append(
                analysis.matrices(
                    subject.model,
                    subject.likelihood,
                    subject.batch,
                    name,
                    approximations=names,
                    source=origin,
                    weights_only=not with_bias,
                    order=order,
                    seed=seed,
                    memory_limit=int(memory_limit * 2**30),
                )
            )
    path = make_folder(out or Path("runs") / f"analyse-{problem}") / "matrices.png"
    _draw(found, path)
    summary = [
        {key: row[key] for key in ("layer", "approximation", "source", "error", "refused")}
        for rows in found
        for row in rows[1:]
    ]
    if as_json:
        print(json.dumps({"picture": str(path), "errors": summary}, indent=2))
        return
    for row in summary:
        text = f"refused: {row['refused']}" if row["refused"] else f"relative error {row['error']:.3f}"
        print(f"layer {row['layer']}, {row['approximation']}: {text}")
    print(f"written: {path}")


def _draw(found: list[list[dict[str, Any]]], path: Path) -> None:
    from kronfac import plots

    grid, titles = [], []
    for exact, *rows in found:
        images, texts = [exact["matrix"]], [""]
        for row in rows:
            images += [row["matrix"], row["difference"]]
            texts += ["refused" if row["refused"] else "", "" if row["refused"] else f"error {row['error']:.2f}"]
        grid.append(images)
        titles.append(texts)
    columns = ["exact"]
    for row in found[0][1:]:
        columns += [row["approximation"], f"|{row['approximation']} − exact|"]
    axes = plots.matrix_images(
        grid, row_labels=[f"layer {rows[0]['layer']}" for rows in found], column_labels=columns, titles=titles
    )
    write_picture(path, axes[0][0])
