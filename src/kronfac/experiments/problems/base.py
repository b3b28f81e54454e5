"""What a problem is: data, a network, a loss and the figures by which training is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kronfac.experiments.datasets import load
from kronfac.experiments.datasets.base import Dataset

if TYPE_CHECKING:
    from kronfac.likelihoods import Likelihood

#: Hyper-parameters of one optimiser, by name.
Hyperparameters = Mapping[str, object]

_EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Data:
    """Tensors ready for training, examples first.

    Attributes:
        train_inputs: Inputs of the training set.
        train_targets: Its targets.
        test_inputs: Inputs of the test set.
        test_targets: Its targets.
    """

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor

    def to(self, device: str) -> Data:
        """Move all tensors.

        Args:
            device: A torch device.

        Returns:
            The data there.
        """
        return Data(*(tensor.to(device) for tensor in vars(self).values()))


@dataclass(frozen=True)
class Problem:
    """A training problem, fully determined by its name and a seed.

    Attributes:
        name: What it is asked for by.
        description: One line for people.
        dataset: Name of its dataset; None where its data are drawn.
        build: Makes the network, drawing its weights from torch's global generator.
        prepare: Turns the dataset into tensors, or draws them.
        likelihood: Makes the likelihood whose negative logarithm is the loss (for curvature).
        loss: The loss of a batch from outputs and targets, averaged over examples; plain torch.
        measures: Further figures, by name, from outputs and targets: their *sums* over the examples given.
        metric: The figure by which runs are compared, such as ``"train_loss"``.
        batch_size: Examples per step, unless a hyper-parameter says otherwise.
        steps: Default budget.
        evaluate_every: Steps between evaluations.
        evaluation_examples: How many training examples an evaluation looks at; None for all.
        tuned: Hyper-parameters of each optimiser, tuned on this problem.
        tuned_over: How they were tuned, for people.
    """

    name: str
    description: str
    dataset: str | None
    build: Callable[[], nn.Module]
    prepare: Callable[[Dataset], Data] | Callable[[], Data]
    likelihood: Callable[[], Likelihood]
    loss: Callable[[Tensor, Tensor], Tensor]
    measures: Mapping[str, Callable[[Tensor, Tensor], Tensor]]
    metric: str = "train_loss"
    batch_size: int = 100
    steps: int = 500
    evaluate_every: int = 10
    evaluation_examples: int | None = None
    tuned: Mapping[str, Hyperparameters] = field(default_factory=dict)
    tuned_over: str = "not tuned"

    @property
    def metrics(self) -> list[str]:
        """The names of the figures an evaluation gives."""
        return [f"{split}_{name}" for split in ("train", "test") for name in ("loss", *self.measures)]

    def data(self) -> Data:
        """Load the dataset and prepare it.

        Returns:
            The tensors.
        """
        return self.prepare(*([] if self.dataset is None else [load(self.dataset)]))

    def model(self, seed: int) -> nn.Module:
        """Build the network with weights that depend on the seed alone; torch's global generator is left as it was.

        Args:
            seed: The seed.

        Returns:
            The network, in training mode.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build().train()

    def evaluate(self, model: nn.Module, data: Data) -> dict[str, float]:
        """Compute every metric, in evaluation mode and without gradients.

        Args:
            model: The network; its mode is restored.
            data: The problem's data.

        Returns:
            A value for each of `metrics`.
        """
        some = slice(self.evaluation_examples)
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                train = self._averages(model, data.train_inputs[some], data.train_targets[some])
                test = self._averages(model, data.test_inputs, data.test_targets)
        finally:
            model.train(training)
        return {f"train_{k}": v for k, v in train.items()} | {f"test_{k}": v for k, v in test.items()}

    def _averages(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, float]:
        totals = dict.fromkeys(("loss", *self.measures), 0.0)
        for x, y in zip(inputs.split(_EVALUATION_BATCH), targets.split(_EVALUATION_BATCH), strict=True):
            outputs = model(x)
            totals["loss"] += self.loss(outputs, y).item() * len(x)
            for name, measure in self.measures.items():
                totals[name] += measure(outputs, y).item()
        return {name: total / len(inputs) for name, total in totals.items()}
