"""``kronfac bench``."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from kronfac.cli.analyse.work import MOST_MEMORY, Out, Threads, threads_of, write_picture
from kronfac.cli.bench_scaling import Asked, bench_scaling
from kronfac.cli.bench_tables import extra_tables, over_base
from kronfac.cli.display import print_table
from kronfac.cli.options import Fresh, Json, words
from kronfac.experiments.bench import (
    FAMILIES,
    LARGE,
    NAMES,
    PARTS,
    PRECISIONS,
    Found,
    Limits,
    advances,
    check,
    check_name,
    chosen,
    run,
)
from kronfac.experiments.environment import environment, warning
from kronfac.experiments.errors import ExperimentError, need
from kronfac.experiments.files import make_folder, write_json, write_text
from kronfac.experiments.lock import locked
from kronfac.experiments.memory import keep_freed_memory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FIRST = "forward+backward, ms"
_TRAINING = ("whole", "step")

_SCALING, _ALL = "Scaling", ",".join(NAMES)
_BUDGET = Limits().seconds

Results = dict[str, Found]


def bench(
    workloads: Annotated[
        str,
        typer.Option(
            help=f"Workloads, with commas between them: {', '.join(NAMES)}; {', '.join(LARGE)} for a GPU; "
            "or small for a quick look."
        ),
    ] = _ALL,
    rounds: Annotated[int, typer.Option(help="Rounds; each runs every part once, in turn.", min=2)] = 30,
    parts: Annotated[bool, typer.Option("--parts", help="Leave training steps out.")] = False,
    only: Annotated[
        str | None,
        typer.Option(
            help=f"What to measure, with commas between them: {', '.join(PARTS)}. By default what fits workload and "
            "device.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[
        str, typer.Option(help=f"Number formats, with commas between them: {', '.join(PRECISIONS)}.")
    ] = "float32",
    processor_time: Annotated[
        bool,
        typer.Option(
            "--processor-time",
            help="Count the processor's time of this process, for a machine that is shared. Needs --threads 1.",
        ),
    ] = False,
    keep_memory: Annotated[
        bool,
        typer.Option(
            "--keep-freed-memory",
            help="Keep what is freed for the next tensors, as the commands that train do; otherwise glibc's defaults.",
        ),
    ] = False,
    scaling: Annotated[
        str | None,
        typer.Option(
            help="In place of workloads, families of networks of which one thing alone grows, with commas between "
            f"them: {', '.join(FAMILIES)}.",
            show_default=False,
            rich_help_panel=_SCALING,
        ),
    ] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option(
            help="Other sizes of a family: --sizes width=256,512. Repeatable.",
            show_default=False,
            rich_help_panel=_SCALING,
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help=f"Seconds for a point, {_BUDGET:g} by default: it takes fewer rounds if need be, and is skipped and "
            "listed as such if not even three would fit.",
            min=0.0,
            show_default=False,
            rich_help_panel=_SCALING,
        ),
    ] = None,
    memory_limit: Annotated[
        float | None,
        typer.Option(
            help="GiB that a point may take; by default three quarters of what is free.",
            min=0.001,
            max=MOST_MEMORY,
            show_default=False,
            rich_help_panel=_SCALING,
        ),
    ] = None,
    fresh: Fresh = False,
    threads: Threads = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure what each part of KFAC costs over one forward and backward, side by side in one process.

    Autoencoder: 784-1000-500-250-30, batch 500. kfc: the network of the KFC paper, and ResNet-20, batch 128. ResNet-50,
    batch 256 of 224x224, and GPT-2 small, 8 texts of 1024 tokens. Whole steps have statistics every 10 and inverses
    every 100 steps; on the large networks and on a GPU each kind of step is timed once and the mean made of them.

    [dim]kronfac bench --workloads kfc --rounds 10 --out runs/bench[/dim]

    With --scaling the figures are of one family of networks after the other. Tables and picture are written after each
    point, and [bold]the same command goes on[/bold] where it was.

    [dim]kronfac bench --device cuda --workloads resnet50,gpt2 --precision float32,bfloat16 --out runs/gpu[/dim]

    [dim]kronfac bench --scaling width,kernel --rounds 10 --out runs/scaling[/dim]
    """  # noqa: DOC501 - a person reads this as help
    if processor_time and (threads != 1 or device != "cpu"):
        raise ExperimentError(
            "--processor-time adds up the time of all threads and sees no GPU: give --threads 1 with it, on the CPU"
        )
    if keep_memory and not keep_freed_memory():
        raise ExperimentError("--keep-freed-memory is a matter of glibc's allocator, which this process does not have")
    names, precisions = words(workloads, "--workloads"), words(precision, "--precision")
    for option, members in (("--workloads", names), ("--precision", precisions)):
        if len(set(members)) < len(members):
            raise ExperimentError(f"{option} names one twice: {', '.join(members)}")
    for name in names:
        check_name(name)
    for form in precisions:
        check(device, form)
    if scaling is not None:
        if workloads != _ALL or parts or len(precisions) > 1:
            raise ExperimentError(
                "--scaling has networks of its own and takes one --precision; leave --workloads and --parts out"
            )
        seconds = _BUDGET if budget is None else budget
        given = (device, precisions[0], processor_time, threads, seconds, memory_limit, out, fresh, as_json)
        bench_scaling(Asked(scaling, sizes or [], rounds, only, *given))
        return
    if sizes or fresh or budget is not None or memory_limit is not None:
        raise ExperimentError("--sizes, --budget, --memory-limit and --fresh belong to --scaling")
    asked = None if only is None else words(only, "--only")
    plans = {name: _plan(name, device, asked, parts) for name in names}
    folder = None if out is None else make_folder(out)
    if folder is not None:
        need("matplotlib", "experiments")
    with locked(folder), threads_of(threads):
        machine = {**environment(), "threads": torch.get_num_threads()}
        setting = {
            "machine": machine,
            "device": device,
            "rounds": rounds,
            "clock": "processor" if processor_time else "wall",
            "freed memory": "kept" if keep_memory else "by default",
        }
        results: Results = {}
        for name, one in _run(plans, rounds, device, precisions, processor_time):
            results[name] = one
            if folder is not None:  # a machine that is lent may be gone before the last one
                _write(folder, setting | _found(results), results)
    if busy := warning(machine):
        print(f"note: {busy}", file=sys.stderr)
    if as_json:
        print(json.dumps(setting | _found(results), indent=2))
        return
    place = f"{machine['threads']} threads" if device == "cpu" else str(machine.get("gpu"))
    if any(one.rows for one in results.values()):
        forms = "" if precisions != ["float32"] else ", float32"
        kept = ", freed memory kept" if keep_memory else ""
        print_table(over_base(results), f"Cost over forward+backward, {place}{forms}{kept}")
    for table, title in extra_tables(results):
        print()
        print_table(table, title)
    if folder is not None and any(one.rows for one in results.values()):
        print(f"picture: {folder / 'bench.png'}")


def _plan(name: str, device: str, only: list[str] | None, parts: bool) -> tuple[str, ...]:
    plan = tuple(part for part in chosen(name, device, only) if not (parts and part in _TRAINING))
    if not plan:
        raise ExperimentError("--parts leaves training steps out, and --only asks for nothing else")
    return plan


def _run(
    plans: dict[str, tuple[str, ...]], rounds: int, device: str, precisions: list[str], processor_time: bool
) -> Iterator[tuple[str, Found]]:
    """Yield what is found of each workload in each precision, as soon as it is."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        total = len(precisions) * sum(advances(name, rounds, plan) for name, plan in plans.items())
        task = bar.add_task("", total=total)
        for name, plan in plans.items():
            for precision in precisions:
                label = name if precision == "float32" else f"{name}, {precision}"
                if not console.is_terminal:
                    print(f"{label} ...", file=sys.stderr, flush=True)
                found = run(
                    name,
                    rounds,
                    only=plan,
                    device=device,
                    precision=precision,
                    processor_time=processor_time,
                    advance=lambda note: bar.update(task, advance=1, description=note),
                )
                yield label, found


def _found(results: Results) -> dict[str, object]:
    """Times, and what was asked for beside them, by kind and workload."""
    kinds: dict[str, dict[str, object]] = {
        "ceilings": {name: one.ceilings.as_dict() for name, one in results.items() if one.ceilings},
        "roofline": {
            name: {part: floor.as_dict() for part, floor in one.roofline.items()}
            for name, one in results.items()
            if one.roofline
        },
        "memory, bytes": {name: one.memory for name, one in results.items() if one.memory},
        "profile": {
            name: {part: [operator.as_dict() for operator in rows] for part, rows in one.profile.items()}
            for name, one in results.items()
            if one.profile
        },
    }
    times = {name: {part: spread.as_dict() for part, spread in one.rows.items()} for name, one in results.items()}
    return {"over forward+backward": times} | {kind: values for kind, values in kinds.items() if values}


def _write(folder: Path, found: dict[str, object], results: Results) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["workload", "part", "median", "low", "high"])
    for name, one in results.items():
        writer.writerows([name, part, s.median, s.low, s.high] for part, s in one.rows.items())
    write_text(folder / "bench.csv", text.getvalue())
    write_json(folder / "bench.json", found)
    timed = {name: one for name, one in results.items() if one.rows}
    if timed:
        write_picture(folder / "bench.png", _draw(timed))


def _draw(results: Results) -> Axes:
    from kronfac.plots import bars
    from kronfac.plots.panels import new_panels

    among = list(dict.fromkeys(part for one in results.values() for part in one.rows if part != _FIRST))
    panels = new_panels(len(results), columns=len(results), width=5.2, height=4.2)
    for axes, (name, one) in zip(panels, results.items(), strict=True):
        rows = one.rows
        shown = {part: spread for part, spread in rows.items() if part != _FIRST}
        bars(
            list(shown),
            [spread.median for spread in shown.values()],
            errors=[0.5 * (spread.high - spread.low) for spread in shown.values()],
            axes=axes,
            x_label=f"over forward+backward ({rows[_FIRST].median:.0f} ms)",
            title=name,
            form="{:.2f}",
            among=among,
        )
    return panels[0]
