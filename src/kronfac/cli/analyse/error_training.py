"""``kronfac analyse training``: the approximation error while a network is trained."""

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
    chosen,
    one_line,
    threads_of,
    values_for,
    working,
    write_picture,
)
from kronfac.cli.display import print_table
from kronfac.cli.options import Json
from kronfac.experiments.files import make_folder, write_csv
from kronfac.experiments.present import Table
from kronfac.experiments.problems import get_problem
from kronfac.experiments.sources import named_source
from kronfac.experiments.subject import first_examples, followed, training_settings


def training(
    problem: Problem,
    steps: Annotated[int, typer.Option(help="Steps of training.", min=0)] = 500,
    every: Annotated[int, typer.Option(help="Steps between measurements.", min=1)] = 25,
    approximations: Approximations = "all",
    source: Annotated[str, typer.Option(help="Source of the approximations: exact, sampled or root.")] = "exact",
    samples: Samples = 1,
    examples: Examples = 128,
    optimizer: Optimizer = "adam",
    settings: Settings = None,
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
    memory_limit: MemoryLimit = 4.0,
    threads: Threads = None,
) -> None:
    """Follow the approximation error of every layer while a network is trained, beside the bounds that theory gives.

    Figure 2 of Gao et al. (2020): the Frobenius errors |Ĉ - C| of all layers added up, for each approximation; bounds,
    where there are any, are dashed. Writes training.csv (every layer) and training.png to runs/analyse-<problem> unless
    --out says otherwise.

    [dim]kronfac analyse training digits-mlp --steps 200 --every 20[/dim]
    """
    from kronfac.analysis import NETWORK, error_during_training
    from kronfac.approximations import APPROXIMATIONS

    task, origin = get_problem(problem), named_source(source, samples)
    run = training_settings(task, optimizer, values_for(settings, steps), steps, seed)
    names = chosen(approximations)
    if names is None and source == "exact":
        names = [name for name in APPROXIMATIONS if name != "dense"]  # which is the exact matrix then
    data = task.data()
    batch = first_examples(data, examples)
    with threads_of(threads), one_line(), working(steps) as work, followed(task, run, data) as followed_training:

        def advance() -> None:
            followed_training.advance()
            work.begin(f"batch loss {followed_training.batch_loss:.4g}")

        rows = error_during_training(
            followed_training.model,
            task.likelihood(),
            batch,
            advance,
            steps=steps,
            every=every,
            approximations=names,
            source=origin,
            seed=seed,
            memory_limit=int(memory_limit * 2**30),
        )
    folder = make_folder(out or Path("runs") / f"analyse-{problem}")
    write_csv(folder / "training.csv", rows)
    networks = [row for row in rows if row["layer"] == NETWORK]
    _draw(networks, folder / "training.png", f"{problem}, {optimizer}, {examples} examples, {source} source")
    if as_json:
        print(json.dumps(rows, indent=2, allow_nan=False))
        return
    print_table(_summary(networks), f"{problem}: Frobenius errors of all layers, added up")
    for name in ("training.csv", "training.png"):
        print(f"written: {folder / name}")


def _summary(networks: list[dict[str, Any]]) -> Table:
    shown = [networks[0]["step"], networks[-1]["step"]]
    cells = []
    for name in dict.fromkeys(row["approximation"] for row in networks):
        own = {row["step"]: row for row in networks if row["approximation"] == name}
        if refused := own[shown[0]]["refused"]:
            cells.append([name, "–", "–", f"refused: {refused}"])
            continue
        within = [row for row in own.values() if row["bound"] is not None]
        note = f"at most {max(row['distance_sum'] / row['bound'] for row in within):.3f} of its bound" if within else ""
        cells.append([name, *(f"{own[step]['distance_sum']:.4g}" for step in shown), note])
    return Table(["approximation", f"step {shown[0]}", f"step {shown[1]}", ""], cells, words=(0, 3))


def _draw(networks: list[dict[str, Any]], path: Path, title: str) -> None:
    from kronfac import plots
    from kronfac.analysis import to_frame

    axes = plots.error_curves(to_frame(networks), title=title)
    write_picture(path, axes)
