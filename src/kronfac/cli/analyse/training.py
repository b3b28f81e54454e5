"""A training that an analysis follows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import torch
import typer
from torch import Tensor

from kronfac.cli.analyse.watch import Watch
from kronfac.cli.options import assignments
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.problems import Problem
from kronfac.experiments.problems.base import Data
from kronfac.experiments.settings import RunSettings, check_settings
from kronfac.experiments.training import Training

_TRAINING = "Training"

FollowedSteps = Annotated[int, typer.Option("--steps", help="Steps of training; 0: the initial weights alone.", min=0)]
Optimizer = Annotated[
    str,
    typer.Option(
        "--optimizer",
        "--optimiser",
        help="Whose training is followed, with the values tuned for the problem.",
        rich_help_panel=_TRAINING,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change a hyper-parameter of the optimiser: --set damping=0.1. Repeatable.",
        show_default=False,
        rich_help_panel=_TRAINING,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        help="Decides initial weights, the order of examples and sampled labels.", min=0, rich_help_panel=_TRAINING
    ),
]


def run_settings(problem: Problem, optimizer: str, settings: Sequence[str], seed: int, steps: int) -> RunSettings:
    """Complete and check the settings of the training, before any data are loaded.

    Args:
        problem: The problem.
        optimizer: Name of the optimiser.
        settings: ``name=value`` texts.
        seed: The seed.
        steps: Number of steps.

    Returns:
        The settings.
    """
    values = get_optimizer(optimizer).resolve(problem.tuned.get(optimizer, {}), assignments(settings, "--set"))
    found = RunSettings(problem.name, optimizer, values, seed, max(1, steps), None, problem.evaluate_every)
    check_settings(found)
    return found


@contextlib.contextmanager
def followed(
    problem: Problem, settings: RunSettings, data: Data, threads: int | None, watch: Watch
) -> Iterator[tuple[Training, Callable[[], None]]]:
    """Prepare a training whose steps an analysis calls.

    Args:
        problem: The problem.
        settings: Its settings.
        data: Its data.
        threads: Torch threads, or None for those in use.
        watch: Hears of every step.

    Yields:
        The training, and the function that does one step.

    Raises:
        Exit: With code 1 if the training, or a measurement on its way, diverges.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            training = Training(problem, settings, data)

            def advance() -> None:
                training.advance()
                watch.stepped(training.step, f"batch loss {training.batch_loss:.4g}")

            yield training, advance
    except (ArithmeticError, torch.linalg.LinAlgError) as error:  # Diverged is one
        watch.message(f"diverged at step {training.step + 1}: {error}; lower lr or raise damping with --set")
        raise typer.Exit(1) from error
    finally:
        torch.set_num_threads(before)


def first_examples(data: Data, examples: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Give the first examples of the training set, in batches.

    Args:
        data: The data.
        examples: How many.
        size: Examples of a batch.

    Returns:
        Pairs of inputs and targets.

    Raises:
        ExperimentError: If there are not as many.
    """
    if examples > len(data.train_inputs):
        raise ExperimentError(f"--examples must be at most the {len(data.train_inputs)} of training, got {examples}")
    inputs, targets = data.train_inputs[:examples], data.train_targets[:examples]
    return list(zip(inputs.split(size), targets.split(size), strict=True))
