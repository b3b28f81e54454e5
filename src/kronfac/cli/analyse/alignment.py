"""``kronfac analyse alignment``: do approximate updates point where exact Gauss-Newton updates do?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from kronfac.cli.analyse.arguments import Problem
from kronfac.cli.analyse.files import for_json, records, write_csv, write_picture
from kronfac.cli.analyse.training import (
    FollowedSteps,
    Optimizer,
    Seed,
    Settings,
    first_examples,
    followed,
    run_settings,
)
from kronfac.cli.analyse.watch import watching
from kronfac.cli.display import print_table
from kronfac.cli.options import Json, Threads, words
from kronfac.experiments.errors import ExperimentError, need
from kronfac.experiments.files import make_folder
from kronfac.experiments.present import Table, number
from kronfac.experiments.problems import get_problem
from kronfac.experiments.sources import named_sources

if TYPE_CHECKING:
    from kronfac.analysis import Alignment, Method

_DTYPES = {"double": torch.float64, "single": torch.float32}


def alignment(
    problem: Problem,
    steps: FollowedSteps = 100,
    every: Annotated[int, typer.Option(help="Steps between measurements.", min=1)] = 50,
    examples: Annotated[int, typer.Option(help="Training examples to measure on.", min=1)] = 250,
    damping: Annotated[float, typer.Option(help="Added to approximate and exact curvature alike.")] = 1e-2,
    approximations: Annotated[
        str,
        typer.Option(
            help="What to compare, with commas between: approximation:source, or approximation:source:rule where the "
            "damping is not added exactly, such as kfac:exact:factored.",
        ),
    ] = "kfac:sampled,kfac:exact,diagonal:exact",
    samples: Annotated[int, typer.Option(help="Samples per example of the sources sampled and root.", min=1)] = 1,
    blocks_only: Annotated[
        bool, typer.Option("--blocks-only", help="Leave out the full Gauss-Newton matrix, the costlier part.")
    ] = False,
    tolerance: Annotated[float, typer.Option(help="Relative residual of conjugate gradients to reach.")] = 1e-5,
    max_iterations: Annotated[int, typer.Option(help="Iterations of one solve at most.", min=1)] = 1000,
    precision: Annotated[str, typer.Option(help="Numbers of the measurement: double or single.")] = "double",
    batch: Annotated[int, typer.Option(help="Examples per pass; decides memory, not results.", min=1)] = 500,
    optimizer: Optimizer = "kfac",
    settings: Settings = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for alignment.csv and alignment.png; by default runs/PROBLEM-alignment.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
    threads: Threads = None,
) -> None:
    """Compare approximate updates with exact Gauss-Newton updates while a network trains.

    Prints the cosine of the angle between -(C' + damping I)^-1 g, with an approximate curvature C', and the same with
    the exact block-diagonal and the exact full Gauss-Newton matrix, found by conjugate gradients: 1 is the best there
    is, and the plain gradient is there for comparison (Botev, Ritter and Barber 2017, Figures 5 to 7). All layers and
    all measurements are in the CSV file and the picture.

    [dim]kronfac analyse alignment digits-autoencoder --steps 200 --every 50[/dim]

    [dim]kronfac analyse alignment digits-mlp --approximations kfac:exact,kfac:exact:factored,dense:exact[/dim]
    """  # noqa: DOC501 - a person reads this as help
    need("pandas", "experiments")
    need("matplotlib", "experiments")
    import pandas as pd

    from kronfac import plots
    from kronfac.analysis import alignment_during_training

    task = get_problem(problem)
    run = run_settings(task, optimizer, settings or [], seed, steps)
    methods = _methods(approximations, samples)
    if precision not in _DTYPES:
        raise ExperimentError(f"--precision must be double or single, got {precision!r}")
    if not damping > 0:
        raise ExperimentError(f"--damping must be positive, got {damping}")
    data = task.data()
    batches = first_examples(data, examples, batch)
    folder = make_folder(out or Path("runs") / f"{problem}-alignment")
    with watching(steps) as watch, followed(task, run, data, threads, watch) as (training, advance):
        try:
            rows = alignment_during_training(
                training.model,
                task.likelihood(),
                batches,
                advance,
                steps=steps,
                every=every,
                methods=methods,
                damping=damping,
                full=not blocks_only,
                tolerance=tolerance,
                max_iterations=max_iterations,
                seed=seed,
                dtype=_DTYPES[precision],
                observe=watch.working,
            )
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ExperimentError(str(error)) from error
    table = records(rows)
    files = [write_csv(folder / "alignment.csv", table)]
    panels = plots.alignment_panels(pd.DataFrame(table), title=f"{problem}: cosine with the exact Gauss-Newton update")
    files.append(write_picture(folder / "alignment.png", panels[0]))
    if as_json:
        print(json.dumps({"problem": problem, "rows": for_json(table), "files": list(map(str, files))}, indent=2))
        return
    print_table(_summary(rows), f"{problem}: cosine with the exact update, all layers")
    print("\n".join(f"wrote {path}" for path in files))


def _methods(text: str, samples: int) -> list[Method]:
    from kronfac.analysis import Method

    try:
        methods = [Method.parse(word) for word in words(text, "--approximations")]
    except (ValueError, TypeError) as error:
        raise ExperimentError(str(error)) from error
    if len({method.name for method in methods}) < len(methods):
        raise ExperimentError(f"--approximations names one twice: {text}")
    names = dict.fromkeys(str(method.source) for method in methods)
    by_name = {source.name: source for source in named_sources(list(names), samples)}
    return [replace(method, source=by_name[str(method.source)]) for method in methods]


def _summary(rows: list[Alignment]) -> Table:
    """Cosines over all layers: a row per method and reference, a column per measurement."""
    whole = [row for row in rows if row.layer == "all layers"]
    steps = list(dict.fromkeys(row.step for row in whole))
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in whole:
        mark = "" if row.converged else " *"
        cells.setdefault((row.method, row.reference), {})[row.step] = number(row.cosine, ".3f") + mark
    return Table(
        ["update", "against", *(f"step {step}" for step in steps)],
        [[method, reference, *(found[step] for step in steps)] for (method, reference), found in cells.items()],
        words=(0, 1),
    )
