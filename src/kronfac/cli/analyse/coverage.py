"""``kronfac analyse coverage``: which block does each parameter get?"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from kronfac.cli.analyse.arguments import Approximation, Norm, Problem
from kronfac.cli.options import Json
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.problems import get_problem


def coverage(
    problem: Problem,
    approximation: Approximation = "kfac",
    norm: Norm = "unitwise",
    damping_rule: Annotated[
        str, typer.Option(help="How inverses are damped: factored, exact, normal or trace_restricted.")
    ] = "factored",
    snapshots: Annotated[
        int, typer.Option(help="Copies of the network that the optimiser keeps; QE-KLD-WRM: n_cap - 1.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Show which block each parameter of a network gets, its size and memory, and whether it is exact. Needs no data.

    [dim]kronfac analyse coverage cifar10-resnet20[/dim]
    """  # noqa: DOC501 - a person reads this as help
    import kronfac as kf

    model = get_problem(problem).model(seed=0)
    try:
        report = kf.coverage(
            model, approximation=approximation, norm=norm, damping_rule=damping_rule, snapshots=snapshots
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ExperimentError(str(error)) from error
    print(json.dumps(report.to_dict(), indent=2) if as_json else report)
