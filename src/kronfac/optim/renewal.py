"""How an optimiser gathers statistics, when it renews them and the inverses, and how the inverses are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch

from kronfac import processes
from kronfac.approximations import Statistic
from kronfac.blocks import Inverse
from kronfac.curvature import BlockDiagonal
from kronfac.damping import Rule
from kronfac.forwards import batches_of, call_model, pick_outputs
from kronfac.measuring import apart_from_training, frozen_buffers
from kronfac.optim.agreement import agree
from kronfac.optim.background import Pending, submit
from kronfac.optim.drift import largest_drift
from kronfac.optim.gathering import Gatherer
from kronfac.optim.health import LayerHealth, Record, condition
from kronfac.optim.itself import on_itself
from kronfac.optim.membership import Membership
from kronfac.optim.options import DEFAULTS
from kronfac.optim.reduced import RoundedDirections, check_reduced
from kronfac.optim.refresh import refresh, renew_values, snapshot
from kronfac.optim.warm import check_factors, require_products
from kronfac.tape import record


class Renewal(Membership):
    """Periods of statistics and inverses, asynchronous inverses, drift and health; the part of KFAC that has no step.

    Its attributes are set by the class that takes steps.
    """

    _gatherer: Gatherer
    _group: Any  # the processes that train the model together
    _rule: Rule
    _periods: tuple[int, int]
    _ema: float
    _warmed: int = 0  # batches of the warm-up
    _partly: frozenset[str] | set[str] = frozenset()  # layers of which only some processes have statistics
    _steps: int
    _inverses: dict[str, Inverse]
    _record: Record
    _rounded: RoundedDirections | None
    _pending: Pending | None

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
        names = ("inverse", "products", "gradients")
        return {n: self._options[n] for n in names if self._options[n] != DEFAULTS[n]}  # type: ignore[literal-required]

    @property
    def _warm(self) -> bool:
        return self._options["inverse"] == "newton_schulz"

    def paused(self) -> AbstractContextManager[None]:
        """Gather no statistics from forwards within the block."""
        return self._gatherer.paused()

    def capture(self) -> AbstractContextManager[Callable[..., None]]:
        """Gather by hand, where the loop never calls the root module or curvature needs the targets.

        Returns:
            A context manager that yields a function ``capture(outputs, targets=None)``; on steps without due statistics
            it does nothing.
        """
        return self._gatherer.capture()

    @on_itself
    def warm_up(self, loader: Iterable[Any] | tuple[Any, Any], batches: int | None = None) -> None:
        """Gather factors from several batches before the first step (Grosse & Martens 2016, 3.1: the whole set).

        They are the plain mean, which from then on counts as ``1/(1 − ema)`` batches at most, so that (33) forgets it.

        Args:
            loader: Pairs ``(inputs, targets)``.
            batches: How many; all by default.

        Raises:
            RuntimeError: Training has begun.
        """
        if self._steps:
            raise RuntimeError("warm_up must come before the first step.")
        self._gatherer.check_layers()
        self._estimator.decay(self._excess)  # of an earlier call: all batches weigh alike
        try:
            self._take_in(loader, batches)
        finally:  # a loader that fails too leaves a mean of the batches before
            self._estimator.decay(1.0 / self._excess)

    def _take_in(self, loader: Iterable[Any] | tuple[Any, Any], batches: int | None) -> None:
        root, estimator = self._gatherer.root, self._estimator
        for index, (inputs, targets) in enumerate(batches_of(loader)):
            if batches is not None and index >= batches:
                break
            with torch.enable_grad(), frozen_buffers(root):
                with record(estimator.adaptation.adapters) as tape:
                    outputs = pick_outputs(call_model(root, inputs), self._options["outputs"])
                self._gatherer.trial(tape, inputs, outputs)
                with apart_from_training():  # as is what a checkpoint repeats
                    estimator.update(tape, outputs, targets)  # nothing is forgotten in between: a plain mean
            self._warmed += 1

    @property
    def _excess(self) -> float:
        """By how much batches of the warm-up outnumber those that an average of the period ``1/(1 − ema)`` sees."""
        return max(1.0, self._warmed * (1.0 - self._ema))

    def curvature(self) -> BlockDiagonal:
        """Return the running curvature as an operator, for analysis.

        Returns:
            The curvature.
        """
        with processes.of(self._group):
            return self._estimator.curvature()

    @property
    def _stats_due(self) -> bool:
        return self._steps % self._periods[0] == 0 or self._steps < self._options["burn_in"]

    @property
    def _inverses_due(self) -> bool:
        step, period = self._steps, self._periods[1]
        return not self._inverses or step % period == 0 or (step < period and step & (step - 1) == 0)

    def _check_statistics(self) -> None:
        if self._stats_due and self._gatherer.gathered == 0:
            seen = "in eval mode or inside paused()" if self._gatherer.forwards == 0 else "without gathering"
            if not (self._steps == 0 and not any(s.empty for s in self._estimator.statistics.values())):
                raise RuntimeError(
                    "Statistics are due at this step, but no forward of the model passed to KFAC was seen since the "
                    f"last one (or only {seen}). Call that module itself in train mode, or gather by hand:\n"
                    "    with optimizer.capture() as capture:\n        z = ...\n        capture(z)"
                )

    def _ready(self) -> dict[str, Statistic]:
        """Statistics that hold anything, in some process at least, by layer, and that the likelihood has a say in."""
        missed, partly = self._gatherer.unreached, self._partly
        ready = {name: s for name, s in self._estimator.statistics.items() if not s.empty or name in partly}
        return {name: s for name, s in ready.items() if name not in missed}

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
        if self._gatherer.gathered:
            self._partly = agree(self._estimator, self._gatherer)
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
        late = {name: s for name, s in ready.items() if name not in self._inverses}  # first called since the last time
        if due and delay and self._inverses and self._steps >= self._periods[1]:
            damping, rules = {name: self._damping(name) for name in ready}, self._rules()
            device = next(self._estimator.model.parameters()).device
            starts = dict(self._inverses) if self._warm else None
            copy = partial(snapshot, ready, damping.__getitem__, rules, starts)
            self._pending = submit(copy, self._steps, delay, device)
        elif due:
            late = ready
        else:
            with self._noting_failures():
                found = renew_values(self._inverses, ready, self._damping, self._rules())
            self._record.renewed(found.inverses, self._steps, found)
        if not late:
            return
        with self._noting_failures():
            found = refresh(self._inverses, late, self._damping, self._rules(), warm=self._warm)
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
                None if self._rounded is None else self._rounded.cosine(name),
            )
            for name in self._estimator.statistics
        }
