"""When an optimiser's statistics and inverses are renewed, and how the inverses are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch.optim import Optimizer

from kronfac.approximations import Statistic
from kronfac.blocks import Inverse
from kronfac.damping import Rule
from kronfac.estimation import Estimator
from kronfac.optim.background import Pending, submit
from kronfac.optim.drift import largest_drift
from kronfac.optim.gathering import Gatherer
from kronfac.optim.health import LayerHealth, Record, condition
from kronfac.optim.options import DEFAULTS, KFACOptions
from kronfac.optim.preconditioning import refresh, renew_values, snapshot
from kronfac.optim.reduced import RoundedDirections, check_reduced
from kronfac.optim.warm import check_factors, require_products


class Renewal(Optimizer):
    """Periods of statistics and inverses, asynchronous inverses, drift and health; the part of KFAC that has no step.

    Its attributes are set by the class that takes steps.
    """

    _options: KFACOptions
    _estimator: Estimator
    _gatherer: Gatherer
    _rule: Rule
    _periods: tuple[int, int]
    _ema: float
    _steps: int
    _inverses: dict[str, Inverse]
    _record: Record
    _rounded: RoundedDirections | None
    _pending: Pending | None

    @abstractmethod
    def _damping(self, layer: str) -> float:
        """Damping of a layer."""

    def _check_renewal(self, *, plain: bool) -> None:
        """Refuse asynchronous, warm-started and rounded inverses, and drift as their trigger, where they cannot be.

        Args:
            plain: Whether the class takes KFAC's own step.

        Raises:
            ValueError: They do not fit.
        """
        delay, kind = self._options["asynchronous"], type(self)
        if not plain or kind._renew_inverses is not Renewal._renew_inverses:
            own = {"asynchronous": delay, "drift": self._options["drift"], **self._of_factors}
            for name, value in own.items():
                if value:
                    text = f"{name}={value!r} does not fit {kind.__name__}, which renews inverses its own way."
                    raise ValueError(text)
        for name, value in self._of_factors.items():
            check_factors(
                f"{name}={value!r}", self._estimator.statistics, self._rule, self._estimator.approximation.name
            )
        if "products" in self._of_factors:
            check_reduced(self._estimator.adaptation.adapters)
        if not delay:
            return
        if any(s.keeps_basis for s in self._estimator.statistics.values()):
            name = self._estimator.approximation.name
            raise ValueError(
                f"asynchronous={delay} does not fit approximation={name!r}, whose statistics need the eigenvectors."
            )
        if delay >= self._periods[1]:
            raise ValueError(f"asynchronous={delay} must be less than invert_every={self._periods[1]}.")

    @property
    def _of_factors(self) -> dict[str, str]:
        """Options that are for inverses of Kronecker factors alone, where they are not the default."""
        names = ("inverse", "products")
        return {n: self._options[n] for n in names if self._options[n] != DEFAULTS[n]}  # type: ignore[literal-required]

    @property
    def _warm(self) -> bool:
        return self._options["inverse"] == "newton_schulz"

    @property
    def _stats_due(self) -> bool:
        return self._steps % self._periods[0] == 0 or self._steps < self._options["burn_in"]

    @property
    def _inverses_due(self) -> bool:
        step, period = self._steps, self._periods[1]
        return not self._inverses or step % period == 0 or (step < period and step & (step - 1) == 0)

    def _ready(self) -> dict[str, Statistic]:
        """Statistics that hold anything, by layer."""
        return {name: s for name, s in self._estimator.statistics.items() if not s.empty}

    def _drifted(self) -> bool:
        """Whether statistics that were just gathered are too far from those that were inverted."""
        bound = self._options["drift"]
        if bound is None or not (self._gatherer.gathered and self._inverses) or self._pending is not None:
            return False
        return largest_drift(self._inverses, self._ready(), self._damping, self._rules()) > bound

    def _forget(self) -> None:
        if self._pending is not None:
            self._pending.copied.wait()
        self._estimator.decay(self._ema)

    def _rules(self) -> Rule | Mapping[str, Rule]:
        """How damping is added: one rule for all layers, or one for each by name."""
        return self._rule

    def _renew_inverses(self) -> None:
        """Bring the inverses up to date with the statistics, where that is due."""
        due = self._drifted() or self._inverses_due
        pending, delay = self._pending, self._options["asynchronous"]
        if pending is not None and (due or pending.due <= self._steps):
            self._pending = None  # a failure is raised once; the old inverses stay
            with self._noting_failures():
                found = pending.result()
            self._inverses |= found.inverses
            self._record.renewed(found.inverses, pending.started, found)
        if not (due or self._gatherer.gathered):
            return
        ready = self._ready()
        if due and delay and self._inverses and self._steps >= self._periods[1]:
            damping, rules = {name: self._damping(name) for name in ready}, self._rules()
            device = next(self._estimator.model.parameters()).device
            starts = dict(self._inverses) if self._warm else None
            copy = partial(snapshot, ready, damping.__getitem__, rules, starts)
            self._pending = submit(copy, self._steps, delay, device)
            return
        with self._noting_failures():
            if due:
                found = refresh(self._inverses, ready, self._damping, self._rules(), warm=self._warm)
            else:
                found = renew_values(self._inverses, ready, self._damping, self._rules())
        if due:
            for name, value in self._of_factors.items():
                require_products(f"{name}={value!r}", found.inverses)
        self._record.renewed(found.inverses, self._steps, found)

    @contextmanager
    def _noting_failures(self) -> Iterator[None]:
        try:
            yield
        except (torch.linalg.LinAlgError, FloatingPointError) as error:
            self._record.failed(error, self._estimator.statistics)
            raise

    def health(self) -> dict[str, LayerHealth]:
        """How the inverse of each layer is: condition number, age in steps, retries in float64, failures, iterations.

        Condition numbers take an eigendecomposition of each factor, as dear as several refreshes: ask now and then.

        Returns:
            By layer.
        """
        record, taken = self._record, self._steps
        return {
            name: LayerHealth(
                condition(self._inverses[name]) if name in self._inverses else None,
                taken - record.made[name] if name in self._inverses and name in record.made else None,
                record.retries[name],
                record.failures[name],
                record.iterations[name],
                record.fallbacks[name],
                None if self._rounded is None else self._rounded.cosines.get(name),
            )
            for name in self._estimator.statistics
        }
