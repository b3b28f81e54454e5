"""The workloads of the cost measurements: model, likelihood, loss and a batch of made-up data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.models import ResNet, autoencoder, kfc_network

#: The workloads of the figures in the documentation.
NAMES = ("autoencoder", "kfc", "resnet20")


@dataclass
class Workload:
    """One model with data.

    Attributes:
        name: Its name.
        model: The network.
        likelihood: The loss for kronfac.
        loss: The same loss for training, a mean over the batch.
        inputs: One batch.
        targets: Its targets.
    """

    name: str
    model: nn.Module
    likelihood: kf.Likelihood
    loss: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor

    def forward_backward(self) -> None:
        """Gradients of one batch, without optimiser."""
        self.model.zero_grad()
        self.loss(self.model(self.inputs), self.targets).backward()


def _summed_bce(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, y, reduction="sum") / len(z)


def make(name: str, seed: int = 0) -> Workload:
    """Build a workload.

    Args:
        name: One of :data:`NAMES`, or ``small``, an autoencoder of 64 numbers for a quick look.
        seed: Of weights and data.

    Returns:
        The workload.

    Raises:
        ExperimentError: There is no such workload.
    """
    sizes = {"autoencoder": (784, 1000, 500, 250, 30), "small": (64, 48, 16)}
    if name not in (*NAMES, *sizes):
        raise ExperimentError(f"there is no workload {name!r}; known are {', '.join((*NAMES, 'small'))}")
    torch.manual_seed(seed)
    if name in sizes:
        x = torch.rand(500, sizes[name][0])
        return Workload(name, autoencoder(sizes[name]), kf.Bernoulli(), _summed_bce, x, x)
    x, y = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    model = kfc_network() if name == "kfc" else ResNet()
    return Workload(name, model, kf.Categorical(), F.cross_entropy, x, y)
