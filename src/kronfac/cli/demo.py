"""``kronfac demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kronfac import experiments
from kronfac.cli.compare import this_command
from kronfac.cli.display import progress_display
from kronfac.cli.options import Fresh, Json, Out
from kronfac.cli.outcome import print_outcome
from kronfac.experiments.settings import MOST_THREADS

# One by default: the network is so small that more threads cost more than they save, above all on a busy machine.
Threads = Annotated[int, typer.Option(help="Torch threads.", max=MOST_THREADS, rich_help_panel="Machine")]


def demo(out: Out = None, as_json: Json = False, fresh: Fresh = False, threads: Threads = 1) -> None:
    """See KFAC beside SGD with momentum and Adam, in about a minute and without a network.

    Trains an autoencoder of 8x8 digits three times from the same weights, each optimiser with its own tuned
    hyper-parameters, and writes pictures and report.html (to runs/demo unless --out says otherwise).
    """
    with progress_display() as display:
        results = experiments.compare(
            "digits-autoencoder",
            ["sgd", "adam", "kfac"],
            out=out or Path("runs") / "demo",
            threads=threads,
            progress=display,
            command=this_command(),
            fresh=fresh,
        )
    print_outcome(results, as_text=not as_json)
