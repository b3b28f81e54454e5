"""The average of all curvatures before, its inverse, and its products: the linear algebra of KLDWRM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from kronfac.approximations import Approximation
from kronfac.blocks import Inverse
from kronfac.curvature import BlockDiagonal
from kronfac.estimator import Estimator
from kronfac.layers import LayerAdapter
from kronfac.optim.iterative_sum import IterativeSum
from kronfac.optim.kfac import KFAC
from kronfac.optim.kldwrm_checks import check_statistics
from kronfac.optim.options import check_finite
from kronfac.optim.refresh import refresh
from kronfac.optim.sub_batch import check_fits
from kronfac.optim.wake import Damped, WakeAverage, layer_product, reweighted_inverse, sum_inverse

_SOLVES: dict[str, Callable[[Damped, Damped, float, str], Inverse]] = {
    "stein": sum_inverse,
    "reweighted": reweighted_inverse,
    "iterative": IterativeSum,
}


class Averages(KFAC):
    """``F̄``, ``B`` and ``[F̄ + B/λ]⁻¹``; the part of KLDWRM that takes no step.

    Its attributes are set by the class that takes steps.
    """

    _variant: str
    _rho: float
    _solve: str
    _second: Estimator | None
    _wake: WakeAverage
    _dampings: dict[str, float]
    _averages: dict[str, Damped]
    _model: dict[str, Damped]
    _sums: bool  # whether the inverses are those of F̄ + B/λ, not of F̄

    def _beside(self, approximation: str | Approximation, options: dict[str, Any]) -> Estimator:
        """Estimator of ``B_k``, fed by the same forwards."""
        first = self._estimator
        second = Estimator(
            first.model,
            first.likelihood,
            approximation=approximation,
            source=options.get("source", "sampled"),
            sharing=self._options["sharing"],
            norm=self._options["norm"],
            generator=first.generator,
        )
        check_statistics(second, "model_approximation")
        check_fits(self._options["stats_examples"], second)
        self._gatherer.beside.append(second)
        return second

    def _forget(self) -> None:
        self._wake.begin()
        self._estimator.begin_loss()
        if self._second is not None:
            self._second.reset()  # B_k is that of the newest batch

    def _leave_out(self) -> None:
        super()._leave_out()
        self._undo()

    def _undo(self) -> None:
        """Take the batch of a step that failed out of the averages, and drop what was made of them."""
        if self._wake.undo():
            self._averages, self._model, self._inverses = {}, {}, {}

    def curvature(self) -> BlockDiagonal:
        """Return the average ``F̄`` as an operator, without its damping.

        Returns:
            The curvature.
        """
        with self._wake.in_place():
            return super().curvature()

    def _damped(self, layer: str, estimator: Estimator | None = None) -> Damped:
        block = (estimator or self._estimator).statistics[layer].block()
        return Damped.of(block, self._rule(block, self._dampings[layer]))

    def _average_of(self, layer: str) -> Damped:
        if layer not in self._averages:
            self._averages[layer] = self._damped(layer)
        return self._averages[layer]

    def _rate(self, adapter: LayerAdapter) -> float:
        """``1/λ`` of a layer."""
        own = {id(p) for p in adapter.parameters.values()}
        rates = {float(group["lr"]) for p, group in self._members() if id(p) in own}
        if len(rates) > 1:
            raise ValueError(
                f"variant={self._variant!r} needs one lr = 1/λ for all of layer {adapter.name!r}: {rates}."
            )
        return rates.pop() if rates else float(self.defaults["lr"])

    def _renew_inverses(self) -> None:
        gathered, adapters = self._gatherer.gathered > 0, self._estimator.adaptation.adapters
        if gathered:  # a batch that the step would refuse must not enter the averages
            check_finite({self._names[id(p)]: p.grad for p, _ in self._members() if p.grad is not None})
        if gathered or not self._inverses:
            self._dampings = {name: self._damping(name) for name in adapters}
            seen = [name for name, s in self._estimator.statistics.items() if gathered and not s.empty]
            self._model = {} if self._variant == "so" else {name: self._damped(name, self._second) for name in seen}
            self._wake.merge()
            self._averages = {}
        elif not self._sums:
            return
        else:
            self._model = {}  # B_k = F̄ between two gatherings (20)
        ready = self._ready()
        for name in self._gatherer.unreached:
            self._inverses.pop(name, None)
        self._sums = bool(self._model)
        if not self._sums:
            refresh(self._inverses, ready, lambda name: self._dampings[name], self._rule)
            return
        solve = _SOLVES[self._solve]
        for name in ready:
            self._inverses.pop(name, None)
            average = self._average_of(name)
            model = self._model.setdefault(name, average)
            self._inverses[name] = solve(average, model, self._rate(adapters[name]), name)

    def _solved(self, scaled: dict[str, Tensor], members: list[tuple[str, nn.Parameter, Any]]) -> dict[str, Tensor]:
        """``[F̄ + B/λ]⁻¹ ĝ/λ``; parameters without curvature have the identity for ``F``."""
        directions = self._directions(scaled)
        if self._variant != "so":
            adapters = self._estimator.adaptation.adapters
            summed = {n for layer in self._inverses for n in adapters[layer].parameter_names} if self._sums else set()
            for layer in self._inverses:
                self._rate(adapters[layer])
            for name, _, group in members:
                if name not in summed:
                    directions[name] = directions[name] / (1.0 + group["lr"])
        return directions

    def _wake_products(
        self,
        scaled: dict[str, Tensor],
        scales: dict[str, float],
        moves: dict[str, Tensor],
        carried: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """``F̄ s`` of the step taken, ``moves`` and ``carried`` together."""
        if not self._rho:
            return {}
        steps = {name: move + carried[name] if name in carried else move for name, move in moves.items()}
        out = dict(steps)  # F̄ = I without curvature
        for layer in self._inverses:
            adapter = self._estimator.adaptation.adapters[layer]
            names = [name for name in adapter.parameter_names if name in moves]
            if not names:
                continue
            if self._variant == "so" and len(names) == len(adapter.parameter_names):
                # F̄ F̄⁻¹ ĝ needs no product.
                out |= {name: -scales[name] * scaled[name] for name in names}
                vector = {name: carried[name] for name in names if name in carried}
                if vector:
                    extra = layer_product(adapter, self._average_of(layer), vector)
                    out |= {name: out[name] + extra[name] for name in names}
            else:
                out |= layer_product(adapter, self._average_of(layer), {name: steps[name] for name in names})
        return {name: out[name] for name in moves}
