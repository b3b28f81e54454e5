"""``kronfac analyse spectrum``: what do approximations make of the curvature's eigenvalues?"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kronfac.cli.analyse.arguments import Norm, Problem
from kronfac.cli.display import print_table
from kronfac.cli.options import Json, Out, words
from kronfac.experiments.errors import ExperimentError, need
from kronfac.experiments.files import make_folder, replace_atomically, write_text
from kronfac.experiments.present import Table, number
from kronfac.experiments.problems import get_problem
from kronfac.experiments.settings import MAX_SEED
from kronfac.experiments.sources import named_source
from kronfac.experiments.subject import first_examples, in_double

if TYPE_CHECKING:
    import pandas as pd

    from kronfac.analysis import Eigenvalue


def spectrum(
    problem: Problem,
    approximations: Annotated[
        str, typer.Option(help="What to compare with the exact blocks, with commas between.")
    ] = "kfac,nearest_kronecker,diagonal",
    layers: Annotated[
        str | None, typer.Option(help="Layers to look at, with commas between; by default all.", show_default=False)
    ] = None,
    examples: Annotated[int, typer.Option(help="Training examples to look at.", min=1)] = 500,
    norm: Norm = "unitwise",
    source: Annotated[str, typer.Option(help="Which cotangents are pulled back: sampled, root or exact.")] = "exact",
    samples: Annotated[int, typer.Option(help="Samples of the sources sampled and root.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of the initial weights and the sampled labels.", min=0, max=MAX_SEED)] = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Compute all eigenvalues of the exact curvature blocks and of their approximations, layer by layer, in float64.

    The network is at its initial weights, in evaluation mode. Writes spectrum.png and spectrum.csv.

    [dim]kronfac analyse spectrum digits-mlp --layers 2,4 --out runs/spectrum[/dim]
    """  # noqa: DOC501 - a person reads this as help
    import kronfac as kf

    need("matplotlib", "experiments")
    pandas = need("pandas", "experiments")
    task, origin = get_problem(problem), named_source(source, samples)
    data, model = task.data(), task.model(seed).double().eval()
    batch = in_double(first_examples(data, examples))
    try:
        rows = kf.analysis.spectrum(
            model,
            task.likelihood(),
            batch,
            approximations=words(approximations, "--approximations"),
            source=origin,
            layers=None if layers is None else words(layers, "--layers"),
            norm=norm,
            seed=seed,
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ExperimentError(str(error).replace("layers=", "--layers ")) from error
    folder = make_folder(out or Path("runs") / f"{problem}-spectrum")
    table = pandas.DataFrame(rows)
    files = [_write_csv(rows, folder / "spectrum.csv"), _draw(table, folder / "spectrum.png")]
    if as_json:
        print(json.dumps({"problem": problem, "files": list(map(str, files)), "layers": _nested(table)}, indent=2))
        return
    print_table(_summary(table), f"{problem}: spectra of the curvature blocks")
    for file in files:
        print(file)


def _write_csv(rows: list[Eigenvalue], path: Path) -> Path:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(rows[0]))
    writer.writerows(map(astuple, rows))
    write_text(path, text.getvalue())
    return path


def _draw(table: pd.DataFrame, path: Path) -> Path:
    from kronfac import plots

    axes = plots.spectrum_panels(table)
    with replace_atomically(path) as stream:
        axes[0].figure.savefig(stream, format="png")  # type: ignore[union-attr]
    return path


def _nested(table: pd.DataFrame) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    for (layer, name), part in table.groupby(["layer", "approximation"], sort=False):
        found.setdefault(layer, {})[name] = part["eigenvalue"].tolist()
    return found


def _summary(table: pd.DataFrame) -> Table:
    """Largest and median eigenvalue, trace, and how many are above a thousandth of the largest."""
    columns = ["layer", "block", "size", "largest", "median", "trace", "above largest/1000"]
    rows = []
    for (layer, name), part in table.groupby(["layer", "approximation"], sort=False):
        values = part["eigenvalue"]
        above = int((values > values.max() / 1000).sum())
        figures = [number(value) for value in (values.max(), values.median(), values.sum())]
        rows.append([str(layer), str(name), str(len(values)), *figures, str(above)])
    return Table(columns, rows, words=(0, 1))
