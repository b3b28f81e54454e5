"""The row of curvlinops: its K-FAC operator and the inverse of it."""

from __future__ import annotations

from functools import partial

from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

from cost_peers.base import Cells, Everything, Gap, Part, Rows, gradients, in_turn, loss_module, matrices
from kronfac.experiments.bench import Workload


def cells(work: Workload) -> Cells:
    """Cells; the operator makes a forward and a backward of its own for its factors."""
    params = [p for layer in matrices(work.model) for p in layer.parameters()]
    all_gradients = gradients(work)
    vector = [all_gradients[p] for p in params]
    data, loss = [(work.inputs, work.targets)], loss_module(work)

    def factors() -> KFACLinearOperator:
        operator = KFACLinearOperator(
            work.model,
            loss,
            params,
            data,
            check_deterministic=False,
            fisher_type="mc",
            num_data=len(work.inputs),
            num_per_example_loss_terms=1,
            separate_weight_and_bias=False,
        )
        operator.compute_kronecker_factors()
        return operator

    def inverse_of(operator: KFACLinearOperator) -> KFACInverseLinearOperator:
        return KFACInverseLinearOperator(operator, damping=1.0, use_heuristic_damping=True)

    operator = factors()
    inverse = inverse_of(operator)
    return {
        "statistics": Part(factors, note="sampled labels, in a pass of its own"),
        "inverse": Part(lambda: inverse_of(operator) @ vector, less="precondition", note="made at its first product"),
        "precondition": Part(lambda: inverse @ vector),
        "step": Gap("curvature only, no optimiser"),
    }


ROWS: Rows = {"curvlinops": cells}
EVERYTHING: Everything = {"curvlinops": partial(in_turn, cells)}
