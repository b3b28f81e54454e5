"""The row of ASDL (on PyPI as asdfghjkl): its K-FAC gradient maker with SGD."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from asdl import FISHER_MC, LOSS_CROSS_ENTROPY, LOSS_MSE, KfacGradientMaker, ParamVector, PreconditioningConfig
from torch.nn import functional as F

from cost_peers.base import BASE, Cells, Everything, Part, Rows, alternating, gradients
from kronfac.experiments.bench import Workload

# Its marks for NVIDIA's profiler raise an error where torch is built without CUDA; they measure nothing here.
if not torch.backends.cuda.is_built():
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: 0


def cells(work: Workload) -> Cells:
    """Cells; for the autoencoder it has no Bernoulli likelihood, so that its labels are sampled from a Gaussian."""
    maker = gradient_maker(work, every=1)
    maker.forward_and_backward()
    saved = gradients(work)
    held: list[ParamVector] = []

    def copies() -> None:  # preconditioning is in place
        held[:] = [ParamVector(list(saved), [g.clone() for g in saved.values()])]

    one = steps(work, every=2)
    kind = "sampled labels" if kind_of_loss(work) == LOSS_CROSS_ENTROPY else "sampled labels of a Gaussian"
    return {
        "statistics": Part(maker.update_curvature, less=BASE, before=work.model.zero_grad, note=kind),
        "inverse": Part(maker.update_preconditioner),
        "precondition": Part(lambda: maker.precondition(vectors=held[0]), before=copies),
        "step": alternating(one, "refresh", 10, "everything every 10 steps (its default is 1), SGD with momentum"),
    }


def steps(work: Workload, every: int) -> Callable[[], None]:
    """Make a function that takes one step."""
    maker = gradient_maker(work, every)
    optimizer = torch.optim.SGD(work.model.parameters(), lr=0.0, momentum=0.9)

    def one() -> None:
        optimizer.zero_grad()
        maker.forward_and_backward()
        optimizer.step()

    return one


def gradient_maker(work: Workload, every: int) -> KfacGradientMaker:
    """Make one that keeps averages, as its examples do."""
    config = PreconditioningConfig(
        data_size=len(work.inputs), damping=1.0, ema_decay=0.1, preconditioner_upd_interval=every
    )
    maker = KfacGradientMaker(work.model, config, fisher_type=FISHER_MC, loss_type=kind_of_loss(work))
    outputs = maker.setup_model_call(work.model, work.inputs)
    loss = F.cross_entropy if kind_of_loss(work) == LOSS_CROSS_ENTROPY else F.binary_cross_entropy_with_logits
    maker.setup_loss_call(loss, outputs, work.targets)
    return maker


def kind_of_loss(work: Workload) -> str:
    """Return the nearest of its two likelihoods."""
    return LOSS_MSE if work.name in ("autoencoder", "small") else LOSS_CROSS_ENTROPY


ROWS: Rows = {"ASDL": cells}
EVERYTHING: Everything = {"ASDL": partial(steps, every=1)}
