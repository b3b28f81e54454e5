"""Arguments that several analyses take."""

from __future__ import annotations

from typing import Annotated

import typer

Problem = Annotated[
    str, typer.Argument(help="Name of a problem; kronfac compare --help lists them.", show_default=False)
]
Approximation = Annotated[
    str,
    typer.Option(help="What of the curvature is kept: kfac, tkfac, ekfac, tekfac, sua, prong, diagonal, dense ..."),
]
Norm = Annotated[str, typer.Option(help="Blocks of normalisation layers: unitwise or full.")]
