"""``kronfac analyse damping``: how much is added to the curvature, beside what is there?"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kronfac.cli.analyse.arguments import Approximation, Norm, Problem
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
from kronfac.experiments.sources import named_source

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from kronfac.analysis import LayerDamping

_PICTURED = 7


def damping(
    problem: Problem,
    steps: FollowedSteps = 200,
    every: Annotated[int, typer.Option(help="Steps between measurements.", min=1)] = 20,
    examples: Annotated[int, typer.Option(help="Training examples to measure on.", min=1)] = 250,
    damping: Annotated[
        float | None,
        typer.Option(help="Damping to look at; by default the optimiser's, or 0.001.", show_default=False),
    ] = None,
    rules: Annotated[str, typer.Option(help="Damping rules, with commas between.")] = "factored,exact",
    approximation: Approximation = "kfac",
    source: Annotated[str, typer.Option(help="Which cotangents are pulled back: sampled, root or exact.")] = "sampled",
    samples: Annotated[int, typer.Option(help="Samples of the sources sampled and root.", min=1)] = 1,
    norm: Norm = "unitwise",
    layers: Annotated[
        str | None,
        typer.Option(
            help=f"Layers of the picture, with commas between; by default up to {_PICTURED} of them.",
            show_default=False,
        ),
    ] = None,
    optimizer: Optimizer = "kfac",
    settings: Settings = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for damping.csv and damping-RULE.png; by default runs/PROBLEM-damping.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
    threads: Threads = None,
) -> None:
    """Follow traces of the curvature and what damping adds to them, layer by layer, while a network trains.

    Above 1, the ratios say that damping outweighs curvature: the step is then closer to a gradient step than to a
    second-order one (Gao et al. 2020, Figure 3). The last column of the table is the trace that damping adds to a
    block, over the block's own. The rule trace_restricted has the ν and the expansion β of the optimiser, if that is
    tkfac with this scheme (its β is 1 before the first step).

    [dim]kronfac analyse damping cifar10-resnet20 --steps 300 --every 20 --layers conv1,fc[/dim]
    """  # noqa: DOC501 - a person reads this as help
    need("pandas", "experiments")
    need("matplotlib", "experiments")
    import pandas as pd

    from kronfac import plots
    from kronfac.analysis import damping_during_training
    from kronfac.cli.analyse.own_rule import OwnRule
    from kronfac.damping import get_rule

    task, origin = get_problem(problem), named_source(source, samples)
    run = run_settings(task, optimizer, settings or [], seed, steps)
    own_damping = run.hyperparameters.get("damping", 1e-3)
    if damping is None and not isinstance(own_damping, float):
        raise ExperimentError(f"{optimizer} chooses its damping while it trains: say with --damping what to look at")
    amount = float(own_damping) if damping is None else damping  # type: ignore[arg-type]
    chosen = list(dict.fromkeys(words(rules, "--rules")))
    try:
        for rule in chosen:
            get_rule(rule)
        _check_damping(amount)
    except (ValueError, TypeError) as error:
        raise ExperimentError(str(error)) from error
    wanted = None if layers is None else words(layers, "--layers")
    _check_layers(wanted, task.model(seed))
    data = task.data()
    batches = first_examples(data, examples, examples)
    folder = make_folder(out or Path("runs") / f"{problem}-damping")
    with watching(steps) as watch, followed(task, run, data, threads, watch) as (training, advance):
        own = OwnRule(training.optimizer)
        try:
            rows = damping_during_training(
                training.model,
                task.likelihood(),
                batches,
                advance,
                steps=steps,
                every=every,
                damping=amount,
                rules=[own.of(rule) for rule in chosen],
                approximation=approximation,
                source=origin,
                norm=norm,
                seed=seed,
            )
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ExperimentError(str(error)) from error
    table = records(rows)
    frame = pd.DataFrame(table)
    files = [write_csv(folder / "damping.csv", table)]
    for rule in chosen:
        split = frame[frame["rule"] == rule]["input_ratio"].notna().any()
        panels = plots.damping_panels(
            frame,
            rule=rule,
            layers=wanted or _pictured(frame),
            columns=("input_ratio", "output_ratio", "trace") if split else ("inflation", "trace"),
            title=f"{problem}: {own.title(rule, amount)}",
        )
        files.append(write_picture(folder / f"damping-{rule}.png", panels[0]))
    if as_json:
        titles = {rule: own.title(rule, amount) for rule in chosen}
        content = {"problem": problem, "damping": amount, "rules": titles, "rows": for_json(table)}
        content["files"] = list(map(str, files))
        print(json.dumps(content, indent=2))
        return
    for rule in chosen:
        last = [row for row in rows if row.rule == rule and row.step == rows[-1].step]
        print_table(_summary(last), f"{problem}: {own.title(rule, amount)} after {rows[-1].step} steps")
        print()
    print("\n".join(f"wrote {path}" for path in files))


def _check_damping(amount: float) -> None:
    from kronfac.damping import check_damping

    check_damping(amount)


def _check_layers(wanted: list[str] | None, model: nn.Module) -> None:
    known = [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    if unknown := [name for name in wanted or [] if name not in known]:
        raise ExperimentError(
            f"--layers: the network has no {', '.join(unknown)} with parameters; it has {', '.join(known)}"
        )


def _pictured(frame: pd.DataFrame) -> list[str]:
    """Layers with Kronecker factors (all if there is none), thinned out evenly."""
    factored = list(dict.fromkeys(frame[frame["input_mean"].notna()]["layer"]))
    layers = factored or list(dict.fromkeys(frame["layer"]))
    if len(layers) <= _PICTURED:
        return layers
    return [layers[round(i * (len(layers) - 1) / (_PICTURED - 1))] for i in range(_PICTURED)]


def _summary(rows: list[LayerDamping]) -> Table:
    columns = ["layer", "trace", "π", "input: added", "/ mean", "output: added", "/ mean", "trace added / trace"]
    lines = [
        [row.layer]
        + [
            "–" if math.isnan(value) else number(value, ".3g")
            for value in (
                row.trace, row.pi, row.input_added, row.input_ratio, row.output_added, row.output_ratio, row.inflation
            )
        ]
        for row in rows
    ]  # fmt: skip
    return Table(columns, lines)
