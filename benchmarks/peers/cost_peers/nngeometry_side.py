"""The row of NNGeometry: K-FAC matrices in parameter space."""

from __future__ import annotations

from functools import partial

import torch
from nngeometry.backend import TorchHooksJacobianBackend
from nngeometry.layercollection import LayerCollection
from nngeometry.metrics import FIM_MonteCarlo
from nngeometry.object import PMatKFAC, PVector
from torch import Tensor, nn

from cost_peers.base import Cells, Everything, Gap, Part, Rows, gradients, in_turn, matrices, one_batch
from kronfac.experiments.bench import Workload


def cells(work: Workload) -> Cells:
    """Cells; batch norm is left out, since its K-FAC blocks do not hold it."""
    layers = LayerCollection()
    for layer in matrices(work.model):
        layers.add_layer_from_model(work.model, layer)
    inputs = work.inputs.clone()  # it asks for the derivative of its inputs
    loader = one_batch(inputs, work.targets)

    def classes() -> PMatKFAC:
        return FIM_MonteCarlo(work.model, loader, PMatKFAC, variant="classif_logits", layer_collection=layers)

    def pixels() -> PMatKFAC:
        backend = TorchHooksJacobianBackend(layer_collection=layers, model=work.model, function=sampled(work.model))
        return PMatKFAC(generator=backend, examples=loader)

    bernoulli = work.name in ("autoencoder", "small")
    statistics = pixels if bernoulli else classes
    matrix = statistics()
    inverse = matrix.inverse(regul=1.0)
    saved = gradients(work)
    names = {layer: name for name, layer in work.model.named_modules()}
    vector = PVector(
        layers,
        dict_repr={names[layer]: tuple(saved[p] for p in layer.parameters()) for layer in matrices(work.model)},
    )
    note = "sampled labels" + (" by a function of ours (FIM_MonteCarlo has no Bernoulli)" if bernoulli else "")
    return {
        "statistics": Part(statistics, note=f"{note}, in a pass of its own"),
        "inverse": Part(lambda: matrix.inverse(regul=1.0)),
        "precondition": Part(lambda: inverse.mv(vector)),
        "step": Gap("curvature only, no optimiser"),
    }


def sampled(model: nn.Module):
    """Make the log-likelihood of sampled pixels, as FIM_MonteCarlo does of classes."""

    def log_likelihood(*batch: Tensor) -> Tensor:
        logits = model(batch[0])
        labels = torch.bernoulli(logits.detach().sigmoid())
        return -nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1, keepdim=True)

    return log_likelihood


ROWS: Rows = {"NNGeometry": cells}
EVERYTHING: Everything = {"NNGeometry": partial(in_turn, cells)}
