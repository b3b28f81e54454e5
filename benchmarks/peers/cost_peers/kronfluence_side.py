"""The row of Kronfluence: factors and eigendecompositions ."""

from __future__ import annotations

from functools import partial

import torch
from kronfluence.analyzer import prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
from kronfluence.factor.eigen import perform_eigendecomposition
from kronfluence.task import Task
from kronfluence.utils.state import State
from torch import Tensor, nn
from torch.nn import functional as F

from cost_peers.base import Cells, Everything, Gap, Part, Rows, in_turn, one_batch
from kronfac.experiments.bench import Workload


class Sampling(Task):
    """The workload's loss, with targets from the model where they are asked for."""

    def __init__(self, work: Workload) -> None:
        self._bernoulli = work.name in ("autoencoder", "small")

    def compute_train_loss(self, batch: tuple[Tensor, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
        """Compute the loss, summed over examples as the analyzer wants it."""
        inputs, targets = batch
        logits = model(inputs)
        if self._bernoulli:
            targets = torch.bernoulli(logits.detach().sigmoid()) if sample else targets
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        if sample:
            targets = torch.multinomial(logits.detach().softmax(1), 1).squeeze(1)
        return F.cross_entropy(logits, targets, reduction="sum")

    def compute_measurement(self, batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        """Compute the loss."""
        return self.compute_train_loss(batch, model)


def cells(work: Workload) -> Cells:
    """Cells, by the functions under its analyzer, which would write to disk and collect garbage besides.

    Eigendecompositions are in float32 like the rest (its default is float64).
    """
    task, state = Sampling(work), State(cpu=True)
    model = prepare_model(work.model, task)
    loader = one_batch(work.inputs, work.targets)
    arguments = FactorArguments(strategy="kfac", eigendecomposition_dtype=torch.float32)

    def statistics() -> dict:
        return fit_covariance_matrices_with_loader(model, state, task, loader, arguments, disable_tqdm=True)[1]

    factors, held = statistics(), {}

    def copies() -> None:  # they are divided in place
        held.update({kind: {layer: t.clone() for layer, t in ts.items()} for kind, ts in factors.items()})

    return {
        "statistics": Part(statistics, note="sampled labels, in a pass of its own, batch norm in evaluation mode"),
        "inverse": Part(
            lambda: perform_eigendecomposition(held, model, state, arguments, disable_tqdm=True),
            before=copies,
            note="eigendecompositions",
        ),
        "precondition": Gap("preconditions the gradients of single examples within its scores only"),
        "step": Gap("influence functions, no optimiser"),
    }


ROWS: Rows = {"Kronfluence": cells}
EVERYTHING: Everything = {"Kronfluence": partial(in_turn, cells)}
