"""``kronfac analyse locations``: are products at different locations uncorrelated? (Gao et al. 2020, figures 7, 8)."""

from __future__ import annotations

import json
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kronfac.cli.analyse.arguments import Problem
from kronfac.cli.analyse.rows import print_rows
from kronfac.cli.analyse.trained import examples, trained
from kronfac.cli.options import Json, words
from kronfac.experiments.errors import ExperimentError, need
from kronfac.experiments.files import make_folder, replace_atomically
from kronfac.experiments.problems import get_problem
from kronfac.experiments.settings import MAX_SEED

if TYPE_CHECKING:
    from kronfac.analysis import LocationCorrelation

#: Locations along the diagonal that the second picture of a layer shows.
ZOOM = 64


def locations(
    problem: Problem,
    layers: Annotated[
        str, typer.Option(help="Names of convolutions, with commas; the first three by default.", show_default=False)
    ] = "",
    steps: Annotated[str, typer.Option(help="Training steps at which to look, rising, with commas.")] = "0,195,390",
    optimizer: Annotated[str, typer.Option("--optimizer", "--optimiser", help="What trains.")] = "sgd",
    look_at: Annotated[int, typer.Option("--examples", help="Training examples to look at.", min=2)] = 256,
    entries: Annotated[int, typer.Option(help="Entries of the products to follow.", min=1)] = 32,
    seed: Annotated[int, typer.Option(help="Of weights, batches, labels and entries.", min=0, max=MAX_SEED)] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the picture and numbers.")] = Path("runs/locations"),
    as_json: Json = False,
) -> None:
    """Correlate the products of activations and derivatives at different locations of convolutions' outputs.

    Writes locations.png, locations.csv (means by distance) and locations.npz (the matrices).

    [dim]kronfac analyse locations cifar10-kfc --steps 0,195,390[/dim]
    """  # noqa: DOC501 - a person reads this as help
    need("matplotlib", "experiments")
    from kronfac.analysis import location_correlation

    task = get_problem(problem)
    at = [_whole(text) for text in words(steps, "--steps")]
    chosen = words(layers, "--layers") if layers else _first_convolutions(task.model(0))
    if not chosen:
        raise ExperimentError(f"{problem}: its network has no convolution without groups")
    make_folder(out)
    data = task.data()
    batches = examples(data, look_at, 64)
    found: dict[int, list[LocationCorrelation]] = {}
    for step, model in trained(problem, data, at, optimizer, seed):
        try:
            found[step] = location_correlation(model, task.likelihood(), batches, chosen, entries=entries, seed=seed)
        except ValueError as error:
            raise ExperimentError(f"{problem}: {error}") from error
    rows = summary_rows(found)
    _write_numbers(found, out)
    _draw(found, out)
    if as_json:
        print(json.dumps({"rows": rows, "folder": str(out)}, indent=2))
        return
    print_rows(rows, (1,), [out / f"locations.{kind}" for kind in ("csv", "npz", "png")])


def summary_rows(found: dict[int, list[LocationCorrelation]]) -> list[dict[str, Any]]:
    """Condense correlations to a row for each step and layer.

    Args:
        found: Correlations by step.

    Returns:
        Mean absolute correlations between neighbouring locations, and between those further apart, with what sampling
        alone gives.
    """
    rows = []
    for step, results in found.items():
        for entry in results:
            apart = [row for row in entry.by_distance() if row[0] >= 1]
            row: dict[str, Any] = {"step": step, "layer": entry.layer, "locations": len(entry.trace)}
            for name, index, floor in (("trace", 1, entry.trace_floor), ("entries", 2, entry.entries_floor)):
                for distance in (1, 2, 4):
                    value = next((line[index] for line in apart if line[0] == distance), nan)
                    row[f"{name}, distance {distance}"] = value if isfinite(value) else None
                row[f"{name}, sampling"] = floor if isfinite(floor) else None
            rows.append(row)
    return rows


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ExperimentError(f"--steps must be whole numbers with commas between them, got {text!r}")
    return int(text)


def _first_convolutions(model: Any) -> list[str]:
    from kronfac.layers import adapt_model
    from kronfac.layers.conv import ConvAdapter

    adapters = adapt_model(model).adapters
    return [name for name, a in adapters.items() if isinstance(a, ConvAdapter) and not a.stack][:3]


def _write_numbers(found: dict[int, list[LocationCorrelation]], out: Path) -> None:
    import numpy as np
    import pandas as pd

    lines = [
        {"step": step, "layer": entry.layer, "distance": d, "trace": trace, "entries": entries}
        for step, results in found.items()
        for entry in results
        for d, trace, entries in entry.by_distance()
    ]
    with replace_atomically(out / "locations.csv") as stream:
        stream.write(pd.DataFrame(lines).to_csv(index=False).encode())
    arrays = {
        f"{step}/{entry.layer}/{what}": getattr(entry, what).numpy()
        for step, results in found.items()
        for entry in results
        for what in ("trace", "entries")
    }
    with replace_atomically(out / "locations.npz") as stream:
        np.savez_compressed(stream, **arrays)


def _draw(found: dict[int, list[LocationCorrelation]], out: Path) -> None:
    from kronfac.plots import ImageRow, correlation_images

    rows = []
    for step, results in found.items():
        images: list[Any] = []
        for entry in results:
            matrix = entry.entries.nan_to_num(0.0).numpy()
            middle = max(0, (len(matrix) - ZOOM) // 2)
            images += [matrix, matrix[middle : middle + ZOOM, middle : middle + ZOOM]]
        rows.append(ImageRow(f"step {step}", images))
    columns = []
    for entry in next(iter(found.values())):
        columns += [f"layer {entry.layer}, all {len(entry.trace)}", f"{min(ZOOM, len(entry.trace))} on the diagonal"]
    figure = correlation_images(
        rows, columns, side=1.7, title="Correlation of the products of activations and derivatives between locations"
    )
    with replace_atomically(out / "locations.png") as stream:
        figure.savefig(stream, format="png", bbox_inches="tight")
