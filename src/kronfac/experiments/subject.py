"""A problem's network after some steps of training, and the examples on which its curvature is analysed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.problems.base import Data, Problem
from kronfac.experiments.settings import RunSettings, check_settings
from kronfac.experiments.training import Diverged, Training

if TYPE_CHECKING:
    from kronfac.likelihoods import Likelihood


@dataclass(frozen=True)
class Subject:
    """What is analysed.

    Attributes:
        model: The network, in evaluation mode.
        likelihood: Its loss.
        batch: Inputs and targets: the first examples of the training set.
    """

    model: nn.Module
    likelihood: Likelihood
    batch: tuple[Tensor, Tensor]


def training_settings(
    problem: Problem, optimizer: str, values: Mapping[str, object], steps: int, seed: int
) -> RunSettings:
    """Complete and check the settings of a training, before any data are loaded.

    Args:
        problem: The problem.
        optimizer: Name of the optimiser.
        values: Hyper-parameters that replace those tuned for the problem.
        steps: Number of steps.
        seed: Decides initial weights, the order of examples and sampled labels.

    Returns:
        The settings.
    """
    resolved = get_optimizer(optimizer).resolve(problem.tuned.get(optimizer, {}), values)
    settings = RunSettings(problem.name, optimizer, resolved, seed, max(1, steps), None, problem.evaluate_every)
    check_settings(settings)
    return settings


def first_examples(data: Data, examples: int) -> tuple[Tensor, Tensor]:
    """Take the first examples of the training set.

    Args:
        data: The problem's data.
        examples: How many.

    Returns:
        Inputs and targets.

    Raises:
        ExperimentError: If there are not as many.
    """
    if not 1 <= examples <= len(data.train_inputs):
        raise ExperimentError(f"examples must be from 1 to the {len(data.train_inputs)} of training, got {examples}")
    return data.train_inputs[:examples], data.train_targets[:examples]


def in_double(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Make floating-point tensors those of float64.

    Args:
        batch: Inputs and targets.

    Returns:
        The same; targets that are labels stay whole numbers.
    """
    inputs, targets = batch
    return inputs.double(), targets.double() if targets.is_floating_point() else targets


@contextlib.contextmanager
def followed(problem: Problem, settings: RunSettings, data: Data) -> Iterator[Training]:
    """Prepare a training whose steps the block does; torch's global generator is left as it was.

    Args:
        problem: The problem.
        settings: The training's settings.
        data: The problem's data.

    Yields:
        The training, before its first step.

    Raises:
        ExperimentError: If it diverges.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        training = Training(problem, settings, data)
        try:
            yield training
        except Diverged as error:
            raise ExperimentError(
                f"{settings.optimizer} diverged at step {training.step + 1} of {problem.name}: {error}; lower its lr"
            ) from error


def train_subject(
    problem: Problem,
    settings: RunSettings,
    data: Data,
    steps: int,
    examples: int,
    stepped: Callable[[int, float], object] | None = None,
) -> Subject:
    """Train a problem's network for some steps, and put it into evaluation mode.

    Without training, batch norm's running statistics are those of the examples: its initial ones (mean 0, variance 1)
    normalise nothing, and would give the curvature of another network.

    Args:
        problem: The problem.
        settings: The training's settings.
        data: The problem's data.
        steps: Steps of training; 0 for the initial weights.
        examples: How many examples to analyse.
        stepped: Called with the number of steps done and the loss of the batch.

    Returns:
        The subject.
    """
    batch = first_examples(data, examples)
    with followed(problem, settings, data) as training:
        while training.step < steps:
            training.advance()
            if stepped is not None:
                stepped(training.step, training.batch_loss)
    model = training.model
    if steps == 0:
        settle_batch_norm(model, batch[0])
    return Subject(model.eval(), problem.likelihood(), batch)


def settle_batch_norm(model: nn.Module, inputs: Tensor) -> None:
    """Set the running statistics of batch norm to those of some inputs.

    Args:
        model: The network, changed in place.
        inputs: A batch of inputs.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta, training = [norm.momentum for norm in norms], model.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches seen, which is one
    with torch.no_grad():
        model.train()(inputs)
    model.train(training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
