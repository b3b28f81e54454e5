"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.settings import MAX_SEED, MOST_THREADS

_BUDGET, _OUTPUT, _MACHINE = "Budget", "Output", "Machine"

Steps = Annotated[
    int | None, typer.Option(help="Stop after this many steps.", rich_help_panel=_BUDGET, show_default=False)
]
Epochs = Annotated[
    float | None,
    typer.Option(
        help="Stop after this many passes through the training set.", rich_help_panel=_BUDGET, show_default=False
    ),
]
Seconds = Annotated[
    float | None,
    typer.Option(
        help="Stop after this many seconds of training; evaluation is not counted.",
        rich_help_panel=_BUDGET,
        show_default=False,
    ),
]
EvaluateEvery = Annotated[
    int | None,
    typer.Option(
        help="Steps between evaluations; by default the problem's.", rich_help_panel=_BUDGET, show_default=False
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        help="What to compare by (lower is better), such as train_loss or test_error; by default the problem's.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for runs, pictures and report; by default runs/ and the problem's name.",
        rich_help_panel=_OUTPUT,
        show_default=False,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the outcome as JSON on standard output.", rich_help_panel=_OUTPUT)
]
Fresh = Annotated[
    bool,
    typer.Option(
        "--fresh", help="Throw away what these runs did before, instead of going on.", rich_help_panel=_OUTPUT
    ),
]


def _period(seconds: float) -> float:
    if not seconds >= 0.0:  # as NaN is not: no checkpoint would ever be due
        raise ExperimentError(f"--checkpoint-every must be a number of at least 0, got {seconds:g}")
    return seconds


CheckpointEvery = Annotated[
    float,
    typer.Option(
        help="Seconds between checkpoints: what a kill costs at most. They change no result.",
        rich_help_panel=_MACHINE,
        callback=_period,
    ),
]
Device = Annotated[str, typer.Option(help="Torch device.", rich_help_panel=_MACHINE)]
Threads = Annotated[
    int | None,
    typer.Option(
        help="Torch threads; by default as many as torch takes. Results are reproducible for a given number.",
        rich_help_panel=_MACHINE,
        show_default=False,
        max=MOST_THREADS,
    ),
]


def words(text: str, what: str) -> list[str]:
    """Split a list with commas.

    Args:
        text: The list.
        what: What it lists, for the error.

    Returns:
        Its members.

    Raises:
        ExperimentError: If it, or a member, is empty.
    """
    members = [member.strip() for member in text.split(",")]
    if not all(members):
        raise ExperimentError(f"{what} must be names or numbers with commas between them, got {text!r}")
    return members


def numbers(text: str, option: str) -> list[float]:
    """Read ``6,3.5``.

    Args:
        text: The list.
        option: The option it was given to, for the error.

    Returns:
        The numbers.

    Raises:
        ExperimentError: If one is no number.
    """
    try:
        return [float(member) for member in words(text, option)]
    except ExperimentError:
        raise
    except ValueError:
        raise ExperimentError(f"{option} must be numbers with commas between them, got {text!r}") from None


def seed_numbers(text: str) -> list[int]:
    """Read ``0,1,2``.

    Args:
        text: The list.

    Returns:
        The seeds.

    Raises:
        ExperimentError: If one is no whole number of at least 0, or too large.
    """
    members = words(text, "--seeds")
    for member in members:
        if not member.isdecimal():
            raise ExperimentError(f"--seeds must be whole numbers with commas between them, got {member!r}")
        if len(member) > len(str(MAX_SEED)) or int(member) > MAX_SEED:  # Python reads no number of 5000 digits
            raise ExperimentError(f"--seeds must be whole numbers of at most {MAX_SEED}, got {member}")
    return [int(member) for member in members]


def assignments(texts: Sequence[str], option: str) -> dict[str, str]:
    """Read ``name=value`` texts.

    Args:
        texts: The texts.
        option: The option they were given to, for the error.

    Returns:
        Values by name.

    Raises:
        ExperimentError: If a text has another form, or a name occurs twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name, value = name.strip(), value.strip()
        if not (equals and name and value):
            raise ExperimentError(f"{option} takes name=value, got {text!r}")
        if name in found:
            raise ExperimentError(f"{option} gives {name} twice")
        found[name] = value
    return found


def by_optimizer(texts: Sequence[str], option: str) -> dict[str, dict[str, str]]:
    """Read ``optimiser.name=value`` texts.

    Args:
        texts: The texts.
        option: The option they were given to, for the error.

    Returns:
        Values by optimiser and name.

    Raises:
        ExperimentError: If a text has another form.
    """
    found: dict[str, dict[str, str]] = {}
    for key, value in assignments(texts, option).items():
        optimizer, dot, name = key.partition(".")
        if not (dot and optimizer and name):
            raise ExperimentError(f"{option} takes optimiser.name=value, such as kfac.damping=0.1, got '{key}={value}'")
        found.setdefault(optimizer, {})[name] = value
    return found
