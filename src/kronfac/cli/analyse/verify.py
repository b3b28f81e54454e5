"""``kronfac analyse verify``: is the curvature that training would use right?"""

from __future__ import annotations

import json
from typing import Annotated

import torch
import typer

from kronfac.cli.analyse.arguments import Approximation, Norm, Problem
from kronfac.cli.options import Json
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.problems import get_problem
from kronfac.experiments.settings import MAX_SEED
from kronfac.experiments.sources import named_source
from kronfac.experiments.subject import first_examples, in_double


def verify(
    problem: Problem,
    approximation: Approximation = "kfac",
    norm: Norm = "unitwise",
    source: Annotated[str, typer.Option(help="Whose cotangents: sampled, root, exact or recursive.")] = "sampled",
    samples: Annotated[int, typer.Option(help="Samples of the sources sampled and root.", min=1)] = 1,
    examples: Annotated[int, typer.Option(help="Training examples to look at; a few are enough.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Of the initial weights and the sampled labels.", min=0, max=MAX_SEED)] = 0,
    train_mode: Annotated[
        bool, typer.Option("--train-mode", help="Compare in training mode, in which batch norm couples the examples.")
    ] = False,
    scale: Annotated[
        float | None,
        typer.Option(help="Exit with code 1 if a factor's scale is further than this from 1.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare the curvature that training would use with the exact Gauss-Newton matrix, layer by layer, in float64.

    [dim]kronfac analyse verify digits-cnn --source exact --scale 1e-8[/dim]
    """  # noqa: DOC501 - a person reads this as help
    import kronfac as kf
    from kronfac.inspect import VerificationError

    if scale is not None and not scale >= 0.0:
        raise ExperimentError(f"--scale must be a number of at least 0, got {scale:g}")
    task, origin = get_problem(problem), named_source(source, samples)
    data, model = task.data(), task.model(seed).double().train(train_mode)
    batch = in_double(first_examples(data, examples))
    try:
        with torch.random.fork_rng(devices=[]):
            report = kf.verify(
                model,
                task.likelihood(),
                batch,
                approximation=approximation,
                norm=norm,
                source=origin,
                seed=seed,
            )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ExperimentError(str(error)) from error
    print(json.dumps(report.to_dict(), indent=2) if as_json else report)
    if scale is not None:
        try:
            report.raise_if(scale=scale)
        except ValueError as error:
            raise ExperimentError(str(error)) from error
        except VerificationError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from error
