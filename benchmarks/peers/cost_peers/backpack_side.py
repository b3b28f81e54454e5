"""The row of BackPACK: its K-FAC extension and its products with Kronecker factors."""

from __future__ import annotations

from functools import partial

from backpack import backpack, extend
from backpack.extensions import KFAC
from backpack.utils.kroneckers import apply_kfac_mat_prod, inv_kfacs
from torch import nn

from cost_peers.base import BASE, Cells, Everything, Gap, Part, Rows, gradients, in_turn
from kronfac.experiments.bench import Workload


def cells(work: Workload) -> Cells:
    """Cells; a network that is not a plain sequence goes through its converter."""
    saved = gradients(work)
    model = extend(work.model, use_converter=work.name == "resnet20")
    pixels = work.name in ("autoencoder", "small")  # of Bernoulli outputs it takes one alone
    loss = extend(nn.MSELoss() if pixels else nn.CrossEntropyLoss())

    def statistics() -> None:
        model.zero_grad()
        with backpack(KFAC(mc_samples=1)):
            loss(model(work.inputs), work.targets).backward()

    statistics()
    params = [p for p in model.parameters() if hasattr(p, "kfac")]
    factors = [p.kfac for p in params]
    inverses = [inv_kfacs(f, shift=1.0) for f in factors]
    columns = [saved[p].reshape(-1, 1) for p in params]
    return {
        "statistics": Part(statistics, less=BASE, note=f"sampled labels{' of a Gaussian' if pixels else ''}"),
        "inverse": Part(lambda: [inv_kfacs(f, shift=1.0) for f in factors], note="by eigenvalues"),
        "precondition": Part(lambda: [apply_kfac_mat_prod(f, v) for f, v in zip(inverses, columns, strict=True)]),
        "step": Gap("curvature only, no optimiser"),
    }


ROWS: Rows = {"BackPACK": cells}
EVERYTHING: Everything = {"BackPACK": partial(in_turn, cells)}
