"""``kronfac analyse autocorrelation``: how far are the assumptions of KFC and PRONG from the truth?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kronfac.cli.analyse.rows import print_rows
from kronfac.cli.analyse.trained import examples, trained
from kronfac.cli.options import Json
from kronfac.experiments.errors import ExperimentError, need
from kronfac.experiments.files import make_folder, replace_atomically
from kronfac.experiments.problems import get_problem
from kronfac.experiments.settings import MAX_SEED

if TYPE_CHECKING:
    from kronfac.analysis import LayerCorrelations

#: Maps drawn of each layer, as in the paper.
SHOWN = 3


def autocorrelation(
    problems: Annotated[
        list[str],
        typer.Argument(
            help="Names of problems with two-dimensional convolutions, drawn below each other.", show_default=False
        ),
    ],
    steps: Annotated[int, typer.Option(help="Training steps before looking.", min=0)] = 390,
    optimizer: Annotated[str, typer.Option("--optimizer", "--optimiser", help="What trains.")] = "sgd",
    look_at: Annotated[int, typer.Option("--examples", help="Training examples to look at.", min=2)] = 512,
    radius: Annotated[int, typer.Option(help="Largest offset to draw, in locations.", min=1)] = 8,
    centred: Annotated[
        bool, typer.Option("--centred", help="Subtract each map's mean; the paper's figures do not.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of weights, batches and labels.", min=0, max=MAX_SEED)] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the pictures and numbers.")] = Path("runs/autocorrelation"),
    as_json: Json = False,
) -> None:
    """Correlate activations and derivatives of convolutions over locations, and between maps.

    Writes autocorrelation.png, cross-map.png, autocorrelation.csv (means) and autocorrelation.npz (everything drawn).

    [dim]kronfac analyse autocorrelation cifar10-kfc-max cifar10-kfc-avg --steps 390[/dim]
    """  # noqa: DOC501 - a person reads this as help
    need("matplotlib", "experiments")
    from kronfac.analysis import convolution_correlations

    make_folder(out)
    found: dict[str, list[LayerCorrelations]] = {}
    for name in dict.fromkeys(problems):
        task = get_problem(name)
        data = task.data()
        batches = examples(data, look_at, 128)
        for _, model in trained(name, data, [steps], optimizer, seed):
            try:
                found[name] = convolution_correlations(model, task.likelihood(), batches, centred=centred, seed=seed)
            except ValueError as error:
                raise ExperimentError(f"{name}: {error}") from error
            if any(entry.spatial.ndim != 3 for entry in found[name]):
                raise ExperimentError(f"{name}: its convolutions are not two-dimensional")
    rows = summary_rows(found)
    _write_numbers(found, rows, out)
    _draw(found, radius, out)
    if as_json:
        print(json.dumps({"rows": rows, "folder": str(out)}, indent=2))
        return
    files = ["autocorrelation.csv", "autocorrelation.npz", "autocorrelation.png", "cross-map.png"]
    print_rows(rows, (0, 1, 2), [out / name for name in files])


def summary_rows(found: dict[str, list[LayerCorrelations]]) -> list[dict[str, Any]]:
    """Condense correlations to a row for each problem, layer and kind.

    Args:
        found: Correlations by problem.

    Returns:
        How many maps there are, and how many of them are not zero throughout; mean absolute autocorrelation of these at
        distances 1, 2 and 4, and median and 90 % quantile of the absolute correlations between them; None where there
        is nothing to average.
    """
    rows = []
    for problem, entries in found.items():
        for entry in sorted(entries, key=lambda e: (e.kind != "derivatives", e.layer)):
            means, between = entry.by_distance(), entry.between_maps()
            row: dict[str, Any] = {"problem": problem, "kind": entry.kind, "layer": entry.layer}
            row["maps"], row["alive"] = entry.spatial.shape[0], len(entry.alive())
            for distance in (1, 2, 4):
                row[f"distance {distance}"] = _value(means[distance]) if distance < len(means) else None
            for quantile in (0.5, 0.9):
                row[f"between maps, {quantile:.0%}"] = _value(between.quantile(quantile)) if len(between) else None
            rows.append(row)
    return rows


def _value(tensor: Any) -> float | None:
    value = float(tensor)
    return value if value == value else None


def _write_numbers(found: dict[str, list[LayerCorrelations]], rows: list[dict[str, Any]], out: Path) -> None:
    import numpy as np
    import pandas as pd

    with replace_atomically(out / "autocorrelation.csv") as stream:
        stream.write(pd.DataFrame(rows).to_csv(index=False).encode())
    arrays = {
        f"{problem}/{entry.kind}/{entry.layer}/{what}": getattr(entry, what).numpy()
        for problem, entries in found.items()
        for entry in entries
        for what in ("spatial", "cross_map")
    }
    with replace_atomically(out / "autocorrelation.npz") as stream:
        np.savez_compressed(stream, **arrays)


def _draw(found: dict[str, list[LayerCorrelations]], radius: int, out: Path) -> None:
    import numpy as np

    from kronfac.analysis.autocorrelation import cropped
    from kronfac.plots import ImageRow, correlation_images

    layers = list(dict.fromkeys(entry.layer for entries in found.values() for entry in entries))
    spatial, cross = [], []
    for kind in ("derivatives", "activations"):
        for problem, entries in found.items():
            own = {entry.layer: entry for entry in entries if entry.kind == kind}
            images: list[Any] = []
            for layer in layers:
                maps = _lively(own[layer]) if layer in own else []
                maps += [None] * (SHOWN - len(maps))
                images += [None if m is None else _square(cropped(m[None], radius)[0], radius) for m in maps]
            spatial.append(ImageRow(f"{kind}\n{problem}", images))
            whole = [_between(own[layer]) if layer in own else None for layer in layers]
            cross.append(ImageRow(f"{kind}\n{problem}", whole))
    three = [f"layer {layer}" for layer in layers for _ in range(SHOWN)]
    figures = {
        "autocorrelation.png": correlation_images(
            [ImageRow(r.label, [None if i is None else np.asarray(i) for i in r.images]) for r in spatial],
            three,
            side=0.95,
            extents=[float(radius)] * len(three),
            title="Autocorrelation over space of three maps of each convolution",
        ),
        "cross-map.png": correlation_images(
            cross, [f"layer {layer}" for layer in layers], side=1.5, title="Correlation between maps at one location"
        ),
    }
    for name, figure in figures.items():
        with replace_atomically(out / name) as stream:
            figure.savefig(stream, format="png", bbox_inches="tight")


def _lively(entry: LayerCorrelations) -> list[Any]:
    """The first maps that are not zero everywhere."""
    return list(entry.spatial[entry.alive()[:SHOWN]])


def _between(entry: LayerCorrelations) -> Any:
    """Correlations between the maps that are not zero everywhere."""
    alive = entry.alive()
    return entry.cross_map[alive][:, alive].numpy() if len(alive) else None


def _square(image: Any, radius: int) -> Any:
    """Offsets up to the radius; NaN beyond the layer's own size."""
    import numpy as np

    size = 2 * radius + 1
    whole = np.full((size, size), np.nan)
    top, left = (size - image.shape[0]) // 2, (size - image.shape[1]) // 2
    whole[top : top + image.shape[0], left : left + image.shape[1]] = image.numpy()
    return whole
