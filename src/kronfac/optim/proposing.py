"""Steps that AdaptiveKFAC proposes: the damping of their directions, and what the quadratic model promises of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kronfac.blocks import EigenInverse, Inverse
from kronfac.damping import exact
from kronfac.linalg.precision import without_autocast
from kronfac.optim.closure import Closure
from kronfac.optim.last_batch import last_batch
from kronfac.optim.objective import Objective
from kronfac.optim.proposal import Proposal, quadratic_model
from kronfac.optim.refresh import refresh

#: Values of ``γ`` that one choice looks at, at most.
CANDIDATES = 7
#: ``λ`` of a calibration, in multiples of the mean eigenvalue of the approximate curvature.
CALIBRATION = tuple(10.0**k for k in range(2, -6, -1))


class Proposing(Objective):
    """The choice of ``γ``, and of the first ``λ``; the part of AdaptiveKFAC that takes no step.

    Its attributes are set by the class that takes steps.
    """

    _momentum: bool
    _fraction: float | None
    _greedy_every: int | None
    _gamma: float
    _ceiling: float
    _calibrates: bool

    @property
    def _greedy_due(self) -> bool:
        step, period = self._steps, self._greedy_every
        return period is not None and step > 0 and (step % period == 0 or (step < period and step & (step - 1) == 0))

    @property
    def _inverses_due(self) -> bool:
        # A layer that was frozen at the last inversion may have statistics now.
        return super()._inverses_due or any(name not in self._inverses for name in self._ready())

    def _best(self, params: list[Tensor], gradients: list[Tensor]) -> Proposal:
        """The proposal of the present ``γ`` or the best of its neighbours', never below ``λ + r``."""
        if self._greedy_due or not self._inverses:
            self._ceiling = CALIBRATION[0] * self._mean_eigenvalue()
        lowest = min(self._lam.value + self._decay, self._ceiling)
        omega = (19 / 20) ** (self._greedy_every or 1)
        known = {} if self._inverses_due else self._inverses
        tried: list[float] = []
        best: Proposal | None = None
        waiting = [self._gamma]
        if self._greedy_due:
            waiting += [self._gamma * omega, self._gamma / omega]
        while waiting:
            gamma = min(max(waiting.pop(0), lowest), self._ceiling)
            if gamma in tried:
                continue
            tried.append(gamma)
            inverses = self._inverses_at(gamma, known)
            known = known or inverses
            proposal = self._propose(gamma, inverses, params, gradients)
            if best is None or self._promise(proposal) < self._promise(best):
                best = proposal
            if not waiting and 2 < len(tried) < CANDIDATES and best.gamma in (min(tried), max(tried)):
                further = omega if best.gamma == min(tried) else 1 / omega
                waiting.append(best.gamma * further)
        assert best is not None
        return best

    @without_autocast
    def _inverses_at(self, gamma: float, known: dict[str, Inverse]) -> dict[str, Inverse]:
        """Inverses for ``γ``: the present ones, known eigenvectors with another shift, or new factorisations."""
        if known and known is self._inverses and gamma == self._gamma:
            return known
        eigen = {n: i for n, i in known.items() if isinstance(i, EigenInverse)}
        if self._rule is exact and known and len(eigen) == len(known):
            return {name: EigenInverse(inverse.basis, gamma) for name, inverse in eigen.items()}
        made: dict[str, Inverse] = {}
        ready = {name: s for name, s in self._estimator.statistics.items() if not s.empty}
        refresh(made, ready, lambda _: gamma, self._rule)
        return made

    def _propose(
        self, gamma: float, inverses: dict[str, Inverse], params: list[Tensor], gradients: list[Tensor]
    ) -> Proposal:
        held, self._inverses = self._inverses, inverses
        try:
            directions = [self._search_direction(params, gradients)]
        finally:
            self._inverses = held
        previous = [self.state[p].get("previous") for p in params]
        if self._momentum and all(v is not None for v in previous):
            directions.append(previous)
        model = quadratic_model(
            self._gatherer,
            self._estimator.likelihood,
            [self._names[id(p)] for p in params],
            gradients,
            directions,
            last_batch(self._gatherer, type(self).__name__, self._fraction),
            self._options["outputs"],
        )
        return Proposal(gamma, inverses, directions, model)

    def _search_direction(self, params: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """``Δ``: the gradient times the present inverses."""
        found = self._directions({self._names[id(p)]: g for p, g in zip(params, gradients, strict=True)})
        return [found[self._names[id(p)]] for p in params]

    def _promise(self, proposal: Proposal) -> float:
        damping = self._lam.value + self._decay
        return proposal.model.change(proposal.model.minimise(damping), damping)

    def _mean_eigenvalue(self) -> float:
        """Of the approximate curvature of all layers that are not frozen; 1 if there is none of it."""
        adapters, ready = self._estimator.adaptation.adapters, self._ready()
        free = [n for n in ready if any(p.requires_grad for p in adapters[n].parameters.values())]
        size = sum({name: p.numel() for n in free for name, p in adapters[n].parameters.items()}.values())
        return max(sum(float(ready[n].block().trace()) for n in free) / size, 1e-12) if size else 1.0

    def _calibrate(self, call: Closure, objective: float, params: list[Tensor], gradients: list[Tensor]) -> None:
        """Start from the ``λ`` whose step lowers the first loss most, among those whose model predicts it well."""
        mean = self._mean_eigenvalue()
        found: list[tuple[float, float]] = []
        known: dict[str, Inverse] = {}
        saved = self._leave(params)
        for multiple in CALIBRATION:
            lam = multiple * mean
            known = self._inverses_at(lam + self._decay, known)
            proposal = self._propose(lam + self._decay, known, params, gradients)
            coefficients = proposal.model.minimise(lam + self._decay)
            predicted = proposal.model.change(coefficients, lam + self._decay)
            torch._foreach_add_(params, proposal.step(coefficients))
            actual = self._objective(call, params) - objective
            torch._foreach_copy_(params, saved)
            if math.isfinite(actual) and actual < 0.5 * predicted < 0:
                found.append((actual, lam))
        self._start = None if saved is self._start else self._start  # all is where it was: no need of two copies
        self._lam.value = min(found)[1] if found else CALIBRATION[0] * mean
        self._gamma, self._inverses, self._calibrates = self._lam.value + self._decay, {}, False

    def pi(self) -> dict[str, float]:
        """How the damping is split over each layer's factors now: ``π`` of equation (10), a mean over groups.

        Returns:
            ``π`` by layer; layers without factors are left out.
        """
        means = {name: block.factor_means() for name, block in self.curvature().blocks.items()}
        return {n: float((m[0] / m[1]).sqrt().mean()) for n, m in means.items() if m is not None}
