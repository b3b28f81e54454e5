"""``kronfac analyse rank``: how many directions does the curvature of a mini-batch see?"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer

from kronfac.cli.analyse.arguments import Problem
from kronfac.cli.display import print_table
from kronfac.cli.options import Json, words
from kronfac.experiments.errors import ExperimentError, need
from kronfac.experiments.files import make_folder, replace_atomically, write_json, write_text
from kronfac.experiments.present import Table
from kronfac.experiments.problems import get_problem
from kronfac.experiments.settings import MAX_SEED
from kronfac.experiments.subject import first_examples, in_double


def rank(
    problem: Problem,
    batch_sizes: Annotated[str, typer.Option(help="Sizes of the batches, with commas between them.")] = (
        "1,2,4,8,16,32,64,128"
    ),
    samples: Annotated[int, typer.Option(help="Labels drawn for each example.", min=1)] = 1,
    examples: Annotated[int, typer.Option(help="Training examples that stand for all data.", min=1)] = 256,
    layer: Annotated[
        str | None, typer.Option(help="Look at the block of this layer alone, such as 2.", show_default=False)
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the initial weights, batches and sampled labels.", min=0, max=MAX_SEED)
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for rank.png, rank.csv and rank.json.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare the rank of mini-batches' curvature with its bounds, and with the rank on all data, in float64.

    [dim]kronfac analyse rank digits-mlp --layer 4 --out runs/rank[/dim]
    """  # noqa: DOC501 - a person reads this as help
    from kronfac.analysis import monte_carlo_rank

    task = get_problem(problem)
    sizes = _sizes(batch_sizes)
    model = task.model(seed).double().eval()
    names = _parameters_of(model, layer)
    folder = None if out is None else make_folder(out)
    data = task.data()
    inputs, targets = in_double(first_examples(data, examples))
    try:
        rows = monte_carlo_rank(
            model,
            task.likelihood(),
            inputs,
            targets,
            batch_sizes=sizes,
            samples=samples,
            parameters=names,
            seed=seed,
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ExperimentError(str(error)) from error
    found = {"problem": problem, "layer": layer, "examples": len(inputs), "seed": seed, "rows": rows}
    title = f"{problem}{'' if layer is None else f', layer {layer}'}: rank of the curvature of mini-batches"
    if folder is not None:
        _write(folder, found, rows, title)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print_table(_table(rows), title)
    if folder is not None:
        print(f"picture: {folder / 'rank.png'}")


def _sizes(text: str) -> list[int]:
    members = words(text, "--batch-sizes")
    for member in members:
        if not member.isdecimal() or int(member) < 1:
            raise ExperimentError(f"--batch-sizes must be whole numbers above 0, with commas between, got {member!r}")
    return [int(member) for member in members]


def _parameters_of(model: torch.nn.Module, layer: str | None) -> list[str] | None:
    if layer is None:
        return None
    own = {
        name: [f"{name}.{key}" for key, p in module.named_parameters(recurse=False) if p.requires_grad]
        for name, module in model.named_modules()
    }
    if not own.get(layer):
        known = ", ".join(name for name, parameters in own.items() if parameters)
        raise ExperimentError(f"--layer: no layer {layer!r} with trained parameters; known: {known}")
    return own[layer]


def _table(rows: list[dict[str, int]]) -> Table:
    columns = [name.replace("_", " ") for name in rows[0]]
    return Table(columns, [[str(value) for value in row.values()] for row in rows], words=())


def _write(folder: Path, found: Mapping[str, object], rows: list[dict[str, int]], title: str) -> None:
    need("matplotlib", "experiments")
    from kronfac.plots import rank_curves

    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "rank.csv", text.getvalue())
    write_json(folder / "rank.json", found)
    figure = rank_curves(rows, title=title).figure
    with replace_atomically(folder / "rank.png") as stream:
        figure.savefig(stream, format="png")  # type: ignore[union-attr]
