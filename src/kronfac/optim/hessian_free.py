"""``HessianFree``: Gauss-Newton steps by conjugate gradients, without any approximation of the curvature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.likelihoods import Likelihood
from kronfac.linalg.conjugate_gradient import conjugate_gradient
from kronfac.linalg.precision import without_autocast
from kronfac.operators import GaussNewtonOperator
from kronfac.operators.passes import same_random_state
from kronfac.optim.adaptive import AdaptiveKFAC
from kronfac.optim.last_batch import last_batch
from kronfac.optim.options import at_least
from kronfac.optim.proposal import Proposal
from kronfac.optim.root import kept_statistics
from kronfac.vectors import require_real

#: Part of the last step from which conjugate gradients start (Martens 2010, section 4.6).
WARM = 0.95


class HessianFree(AdaptiveKFAC):
    """Truncated Gauss-Newton (Martens 2010): ``(G + (λ + r)I) δ = −∇h`` by conjugate gradients with exact products.

    The solution is scaled by the exact minimum of the quadratic model along it, ``λ`` follows the reduction ratio at
    every step, and steps that raise the loss are taken back, all as in :class:`kronfac.optim.AdaptiveKFAC`.  Conjugate
    gradients start from the last step and are preconditioned by Kronecker factors, if wished.

    Args:
        model: The module that the closure calls.
        likelihood: The loss.
        damping: Initial ``λ``; ``"auto"`` tries several on the first mini-batch, with the preconditioner's curvature.
        max_iterations: Conjugate gradients end after so many iterations in any case.
        progress: They end when the objective falls by less than this part of itself per iteration (Martens 2010, 4.4).
        tolerance: They end when the residual has this part of the gradient's norm.
        precondition: Whether the damped inverse of the approximate curvature preconditions.
        block_diagonal: Solve with each layer's block of ``G`` alone, layer by layer.
        **options: As for :class:`kronfac.optim.AdaptiveKFAC`; ``momentum`` and ``greedy_every`` have no meaning here.

    Attributes:
        iterations: Iterations of the last step, over all layers.

    Raises:
        TypeError: An option has no meaning here.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        damping: float | str = "auto",
        max_iterations: int = 50,
        progress: float = 5e-4,
        tolerance: float = 1e-5,
        precondition: bool = True,
        block_diagonal: bool = False,
        **options: Any,
    ) -> None:
        at_least("max_iterations", max_iterations, 1, integer=True)
        at_least("progress", progress, 0.0, open_=True)
        at_least("tolerance", tolerance, 0.0, open_=True)
        if unfit := sorted(set(options) & {"momentum", "greedy_every"}):
            raise TypeError(f"HessianFree takes no {', '.join(unfit)}: conjugate gradients find the direction.")
        if damping == "auto" and not precondition:
            raise ValueError(
                "damping='auto' needs the preconditioner's curvature; give a number, or precondition=True."
            )
        self._precondition = precondition  # asked for by the base class's constructor
        super().__init__(
            model, likelihood, damping=damping, momentum=False, **{"adapt_every": 1, "fraction": 1.0, **options}
        )
        self._limits: dict[str, Any] = {
            "max_iterations": max_iterations,
            "progress": progress,
            "tolerance": tolerance,
        }
        self._block_diagonal, self.iterations = block_diagonal, 0
        require_real(self._names[id(p)] for p, _ in self._members() if p.requires_grad and p.is_complex())

    @property
    def _stats_due(self) -> bool:
        return self._precondition and super()._stats_due

    @property
    def _inverses_due(self) -> bool:
        return self._precondition and super()._inverses_due

    @property
    def _greedy_due(self) -> bool:
        return False

    def _best(self, params: list[Tensor], gradients: list[Tensor]) -> Proposal:
        """The one proposal there is; the preconditioner's damping is the matrix's own, as of its last factorisation."""
        if self._inverses_due or not self._precondition:
            self._gamma = self._lam.value + self._decay
        known = {} if self._inverses_due else self._inverses
        inverses = self._inverses_at(self._gamma, known) if self._precondition else {}
        return self._propose(self._gamma, inverses, params, gradients)

    @without_autocast
    def _search_direction(self, params: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """``Δ`` with ``(G + (λ + r)I) Δ = ∇h``, to the tolerance; Kronecker factors alone while ``λ`` is calibrated."""
        if self._calibrates:
            return super()._search_direction(params, gradients)
        names = [self._names[id(p)] for p in params]
        gradient = dict(zip(names, gradients, strict=True))
        previous = [self.state[p].get("previous") for p in params]
        warm = all(v is not None for v in previous)
        before = {name: v * -WARM for name, v in zip(names, previous, strict=True)} if warm else {}
        batch = last_batch(self._gatherer, "HessianFree", self._fraction)
        with same_random_state(self._gatherer.root, self._gatherer.last_random):
            matrix = GaussNewtonOperator(
                self._gatherer.root,
                self._estimator.likelihood,
                [(batch.inputs, batch.targets)],
                parameters=names,
                outputs=self._options["outputs"],
            )
        whole = batch.whole if self._estimator.likelihood.reduction == "sum" else 1.0
        groups = self._layers(names) if self._block_diagonal else [names]
        solution: dict[str, Tensor] = {}
        self.iterations = 0
        for group in groups:
            with kept_statistics(self._gatherer.root):
                found = conjugate_gradient(
                    lambda v: self._product(matrix, v, gradient, whole),
                    {name: gradient[name] for name in group},
                    preconditioner=self._preconditioned if self._inverses else None,
                    start={name: before[name] for name in group} if before else None,
                    **self._limits,
                )
            solution |= found.solution
            self.iterations += found.iterations
        return [solution[name] for name in names]

    def _product(
        self, matrix: GaussNewtonOperator, vector: dict[str, Tensor], like: dict[str, Tensor], whole: float
    ) -> dict[str, Tensor]:
        """``(G + (λ + r)I) v`` for a vector that is zero elsewhere, restricted to where it is not."""
        full = {name: vector[name] if name in vector else torch.zeros_like(g) for name, g in like.items()}
        product = matrix.matmul(full)
        damping = self._lam.value + self._decay
        return {name: whole * product[name] + damping * v for name, v in vector.items()}

    def _preconditioned(self, vector: dict[str, Tensor]) -> dict[str, Tensor]:
        found = self._directions(vector)
        return {name: found[name] for name in vector}

    def _layers(self, names: Sequence[str]) -> list[list[str]]:
        """Names of these parameters layer by layer; parameters without a layer are groups of their own."""
        adapters, free = self._estimator.adaptation.adapters.values(), set(names)
        layers = [[name for name in adapter.parameter_names if name in free] for adapter in adapters]
        layers = [layer for layer in layers if layer]
        held = {name for layer in layers for name in layer}
        return [*layers, *([name] for name in names if name not in held)]
