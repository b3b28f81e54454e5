"""Networks that were trained for a few steps before an analysis looks at them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kronfac.cli.display import progress_display
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.problems import Data, get_problem
from kronfac.experiments.settings import RunSettings, check_settings
from kronfac.experiments.subject import first_examples
from kronfac.experiments.training import Diverged, Training


def trained(
    problem: str, data: Data, steps: Sequence[int], optimizer: str, seed: int
) -> Iterator[tuple[int, torch.nn.Module]]:
    """Train with the problem's hyper-parameters and stop at some steps.

    Args:
        problem: Name of the problem.
        data: Its data.
        steps: Steps at which to look, rising; 0 for the initial network.
        optimizer: Name of the optimiser.
        seed: Decides initial weights and the order of examples.

    Yields:
        Each of these steps and the network then, in evaluation mode; it goes on changing afterwards.

    Raises:
        ExperimentError: Bad names or numbers, or training diverged.
    """
    if not steps or min(steps) < 0 or sorted(set(steps)) != list(steps):
        raise ExperimentError(f"--steps must be whole numbers of at least 0, rising, got {list(steps)}")
    task = get_problem(problem)
    values = get_optimizer(optimizer).resolve(task.tuned.get(optimizer, {}))
    settings = RunSettings(problem, optimizer, values, seed, max(1, steps[-1]), None, 1)
    check_settings(settings)
    with torch.random.fork_rng(devices=[]), progress_display() as display:
        torch.manual_seed(seed)
        training = Training(task, settings, data)
        display.plan(1)
        display.started(settings, 0)
        for step in steps:
            try:
                while training.step < step:
                    training.advance()
                    display.stepped(training.step, training.seconds, training.batch_loss)
            except Diverged as reason:
                raise ExperimentError(f"{problem}: training diverged at step {training.step}: {reason}") from reason
            display.message(f"{problem}: looking at step {step}")
            training.model.eval()
            yield step, training.model
            training.model.train()
        display.finished(settings, "done", "")


def examples(data: Data, count: int, batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Take the first training examples, in batches.

    Args:
        data: The problem's data.
        count: How many.
        batch: Examples per batch.

    Returns:
        Pairs of inputs and targets.
    """
    inputs, targets = (tensor.split(batch) for tensor in first_examples(data, count))
    return list(zip(inputs, targets, strict=True))
