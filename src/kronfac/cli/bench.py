"""``kronfac bench``."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from kronfac.cli.analyse.work import Out, Threads, threads_of, write_picture
from kronfac.cli.display import print_table
from kronfac.cli.options import Json, words
from kronfac.experiments.bench import NAMES, Spread, advances, make, measure
from kronfac.experiments.environment import environment, warning
from kronfac.experiments.errors import ExperimentError, need
from kronfac.experiments.files import make_folder, write_json, write_text
from kronfac.experiments.present import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FIRST = "forward+backward, ms"

Results = dict[str, dict[str, Spread]]


def bench(
    workloads: Annotated[
        str, typer.Option(help=f"Workloads, with commas between them: {', '.join(NAMES)}, or small for a quick look.")
    ] = ",".join(NAMES),
    rounds: Annotated[int, typer.Option(help="Rounds; each runs every part once, in turn.", min=2)] = 30,
    parts: Annotated[bool, typer.Option("--parts", help="Leave whole training steps out.")] = False,
    processor_time: Annotated[
        bool,
        typer.Option(
            "--processor-time",
            help="Count the processor's time of this process, for a machine that is shared. Needs --threads 1.",
        ),
    ] = False,
    threads: Threads = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure what each part of KFAC costs over one forward and backward, side by side in one process.

    Autoencoder: 784-1000-500-250-30, batch 500. kfc: the network of the KFC paper, and ResNet-20, batch 128. Whole
    steps have statistics every 10 and inverses every 100 steps. Medians over rounds, with quartiles.

    [dim]kronfac bench --workloads kfc --rounds 10 --out runs/bench[/dim]
    """  # noqa: DOC501 - a person reads this as help
    if processor_time and threads != 1:
        raise ExperimentError("--processor-time adds up the time of all threads: give --threads 1 with it")
    names = words(workloads, "--workloads")
    for name in names:
        make(name)
    folder = None if out is None else make_folder(out)
    if folder is not None:
        need("matplotlib", "experiments")
    with threads_of(threads):
        machine = {**environment(), "threads": torch.get_num_threads()}
        results = _measure(names, rounds, parts, processor_time)
    if busy := warning(machine):
        print(f"note: {busy}", file=sys.stderr)
    found = {
        "machine": machine,
        "rounds": rounds,
        "clock": "processor" if processor_time else "wall",
        "over forward+backward": {
            name: {part: spread.as_dict() for part, spread in rows.items()} for name, rows in results.items()
        },
    }
    if folder is not None:
        _write(folder, found, results)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print_table(_table(results), f"Cost over forward+backward, {machine['threads']} threads, float32")
    if folder is not None:
        print(f"picture: {folder / 'bench.png'}")


def _measure(names: list[str], rounds: int, parts: bool, processor_time: bool) -> Results:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(names) * advances(rounds, not parts))
        results = {}
        for name in names:
            if not console.is_terminal:
                print(f"{name} ...", file=sys.stderr, flush=True)
            results[name] = measure(
                name,
                rounds,
                whole_steps=not parts,
                processor_time=processor_time,
                advance=lambda note: bar.update(task, advance=1, description=note),
            )
    return results


def _table(results: Results) -> Table:
    rows = [[part, *(str(found[part]) for found in results.values())] for part in next(iter(results.values()))]
    return Table(["over forward+backward", *results], rows)


def _write(folder: Path, found: dict[str, object], results: Results) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["workload", "part", "median", "low", "high"])
    for name, rows in results.items():
        writer.writerows([name, part, s.median, s.low, s.high] for part, s in rows.items())
    write_text(folder / "bench.csv", text.getvalue())
    write_json(folder / "bench.json", found)
    write_picture(folder / "bench.png", _draw(results))


def _draw(results: Results) -> Axes:
    from kronfac.plots import bars
    from kronfac.plots.panels import new_panels

    panels = new_panels(len(results), columns=len(results), width=5.2, height=4.2)
    for axes, (name, rows) in zip(panels, results.items(), strict=True):
        shown = {part: spread for part, spread in rows.items() if part != _FIRST}
        bars(
            list(shown),
            [spread.median for spread in shown.values()],
            errors=[0.5 * (spread.high - spread.low) for spread in shown.values()],
            axes=axes,
            x_label=f"over forward+backward ({rows[_FIRST].median:.0f} ms)",
            title=name,
            form="{:.2f}",
        )
    return panels[0]
