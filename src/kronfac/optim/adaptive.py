"""``AdaptiveKFAC``: K-FAC that chooses its own step size, momentum and damping."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from kronfac.approximations import Approximation
from kronfac.blocks import EigenInverse, Inverse
from kronfac.damping import Rule, exact
from kronfac.likelihoods import Likelihood
from kronfac.optim.averaging import update_average
from kronfac.optim.closure import Closure
from kronfac.optim.kfac import KFAC
from kronfac.optim.last_batch import last_batch
from kronfac.optim.levenberg_marquardt import LevenbergMarquardt
from kronfac.optim.options import KFACOptions, at_least, check_finite
from kronfac.optim.preconditioning import refresh
from kronfac.optim.proposal import Proposal, quadratic_model
from kronfac.optim.report import StepReport
from kronfac.sources import Source

#: Trial steps of one step before it gives up; each quadruples ``λ``.
TRIALS = 20
#: Steps that are checked one by one at the start and after a rejection.
PROBATION = 5
#: Part of the curvature along the step below which ``λ`` is not lowered: it has no say there.
NEGLIGIBLE = 1e-4
#: A loss that grows by this factor over a step that was not checked is looked at again without that step.
SUSPICIOUS = 1.5
#: What its own part of a state holds.
STATE = {"lam", "streak", "gamma", "probation", "calibrates", "unchecked", "ceiling"}
#: Values of ``γ`` that one choice looks at, at most.
CANDIDATES = 7
#: ``λ`` of a calibration, in multiples of the mean eigenvalue of the approximate curvature.
CALIBRATION = tuple(10.0**k for k in range(2, -6, -1))


class AdaptiveKFAC(KFAC):
    """K-FAC whole (Grosse & Martens 2016, A.2; Martens & Grosse 2015): there is nothing to tune.

    A step is ``δ = −α Δ + μ δ_prev`` with ``Δ = (F̂ + γI)⁻¹ ∇h``; ``α`` and ``μ`` minimise the quadratic model
    ``M(δ) = h + ∇hᵀδ + ½ δᵀ(F + (λ + r)I)δ`` with the *exact* curvature ``F`` of the mini-batch, by one forward-mode
    pass (36). ``λ`` follows the reduction ratio ``ρ`` (37, 38); ``γ`` is the best of three neighbouring values every
    ``greedy_every`` steps (and of their neighbours, while the outermost is best), not below ``λ + r`` and not beyond a
    hundred mean eigenvalues of ``F̂``, where all directions are the gradient's.  Both are on the scale of the curvature.

    The step is taken with a closure that returns the loss **without** calling backward::

        loss = optimizer.step(lambda: F.cross_entropy(model(x), y))

    The closure must call the model once; where ``λ`` is adapted it is evaluated again at the trial point, with the same
    state of torch's random generators, so that dropout keeps its masks. On such steps a loss that rises or is not
    finite takes the step back and raises ``λ`` until it falls. In between, a loss that is not finite takes the
    step before back. A step that finds no descent at all raises a ``RuntimeError`` and leaves the parameters as they
    were.

    Args:
        model: The module that the closure calls.
        likelihood: The loss, e.g. ``kronfac.Categorical()``.
        damping: Initial ``λ``; ``"auto"`` tries several on the first mini-batch. Martens & Grosse start at 150.
        weight_decay: ``r``; adds ``r/2 ‖θ‖²`` to the objective. The loss that is returned is without it.
        momentum: Whether ``δ_prev`` is one of the directions.
        approximation: ``"kfac"`` or any other.
        source: ``"sampled"`` (true Fisher), ``"exact"`` or any other.
        damping_rule: ``"factored"``, ``"exact"`` (for which three ``γ`` cost one factorisation) or a rule.
        stats_every: Statistics period in steps.
        invert_every: Inverse period ``T₃``; before it, inverses are also refreshed at steps 1, 2, 4, 8, …
        adapt_every: Period ``T₁`` of the adaptation of ``λ``, also of the check that the loss falls.
        greedy_every: Period ``T₂`` of the choice of ``γ``; before its end also at steps 1, 2, 4, 8, …; None
            to keep the first.
        ema: Decay of the statistics per gathered step, with bias correction.
        fraction: Part of the mini-batch for the exact curvature, in ``(0, 1]``; ``"auto"`` is the quarter of
            Martens & Grosse (``τ₂``), at least 250 examples, and the whole mini-batch where its examples depend on each
            other (batch norm in train mode) or on torch's random numbers (dropout).
        average: Decay of the average of iterates, see :meth:`averaged`; Martens & Grosse take 0.99.
        generator: For the sampled labels; one with a fixed seed by default.
        **options: ``sharing``, ``norm``, ``stats_examples`` and ``outputs`` of
            :class:`kronfac.optim.options.KFACOptions`.

    Attributes:
        report: The last step's :class:`kronfac.optim.report.StepReport`, or None.

    Raises:
        TypeError: An argument is of the wrong type, or an option has no meaning here.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        damping: float | str = "auto",
        weight_decay: float = 0.0,
        momentum: bool = True,
        approximation: str | Approximation = "kfac",
        source: str | Source = "sampled",
        damping_rule: str | Rule = "factored",
        stats_every: int = 1,
        invert_every: int = 20,
        adapt_every: int = 5,
        greedy_every: int | None = 20,
        ema: float = 0.95,
        fraction: float | str = "auto",
        average: float | None = None,
        generator: torch.Generator | None = None,
        **options: Unpack[KFACOptions],
    ) -> None:
        if damping != "auto":
            at_least("damping", damping, 0.0, open_=True)
        at_least("adapt_every", adapt_every, 1, integer=True)
        if greedy_every is not None:
            at_least("greedy_every", greedy_every, 1, integer=True)
        if fraction != "auto" and not (isinstance(fraction, (int, float)) and 0 < fraction <= 1):
            raise ValueError(f"fraction={fraction!r} must be a number in (0, 1], or 'auto'.")
        if unfit := sorted(set(options) & {"decoupled_weight_decay", "burn_in", "param_groups"}):
            raise TypeError(
                f"{type(self).__name__} takes no {', '.join(unfit)}: it minimises one objective in all parameters."
            )
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise ValueError(f"{type(self).__name__} does not run on several processes; kronfac.optim.KFAC does.")
        super().__init__(
            model,
            likelihood,
            1.0,
            momentum=0.0,
            damping=1.0 if isinstance(damping, str) else damping,
            weight_decay=weight_decay,
            approximation=approximation,
            source=source,
            damping_rule=damping_rule,
            stats_every=stats_every,
            invert_every=invert_every,
            ema=ema,
            kl_clip=None,
            average=average,
            generator=generator,
            **KFACOptions(**{**options, "burn_in": 0}),
        )
        if likelihood.needs_targets and stats_every != 1:
            raise ValueError(f"{likelihood!r} needs the targets at each step, captured by hand: set stats_every=1.")
        self._decay, self._momentum = float(weight_decay), momentum
        self._fraction = None if isinstance(fraction, str) else float(fraction)
        self._adapt_every, self._greedy_every = adapt_every, greedy_every
        start = float(self.defaults["damping"])
        self._lam = LevenbergMarquardt(start, (19 / 20) ** adapt_every)
        self._calibrates, self._probation = damping == "auto", PROBATION
        self._gamma = start + self._decay
        self._ceiling = math.inf  # of γ: beyond it all directions are the gradient's
        self._unchecked: float | None = None  # loss before the last step, if that was not checked
        self.report: StepReport | None = None

    @property
    def _keeps_arguments(self) -> bool:
        return True

    # ---------------------------------------------------------------- step
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Evaluates the model once and returns the loss, without calling backward.

        Returns:
            The loss before the step.

        A loss that is not finite at a point that the optimiser did not choose stops it with a ``FloatingPointError``;
        no step that lowers the loss, or a closure that does not do what is asked of it, with a ``RuntimeError``.
        """
        self._gatherer.check_layers()
        params: list[Tensor] = [p for p, _ in self._members()]
        call = Closure(closure, self._gatherer.root, params)
        loss, gradients = self._gradient(call, params)
        self._check_forwards()
        if self._steps == 0:
            call.check_repeatable(loss)
        if self._decay:
            torch._foreach_add_(gradients, params, alpha=self._decay)
        objective = loss + self._penalty(params)
        if self._calibrates:
            self._calibrate(call, objective, params, gradients)
        best = self._best(params, gradients)
        self._gamma, self._inverses = best.gamma, best.inverses
        self._take(call, loss, objective, params, best)
        if self._average is not None:
            update_average(params, self.state, self._average, self._steps)
        self._steps += 1
        self._gatherer.reset()
        return loss

    def _gradient(self, call: Closure, params: list[Tensor]) -> tuple[float, list[Tensor]]:
        """Evaluate loss and gradient; take the step before back if they are not finite, or if it blew the loss up."""
        previous = [self.state[p].get("previous") for p in params]
        known = self._steps > 0 and all(v is not None for v in previous)
        try:
            found = self._finite_gradient(call, params)
            if not known or self._unchecked is None or found[0] <= SUSPICIOUS * abs(self._unchecked):
                return found
        except FloatingPointError:
            if not known:
                raise
            found = math.inf, []
        torch._foreach_sub_(params, previous)
        if found[1] and call.value() >= found[0]:
            torch._foreach_add_(params, previous)  # a hard mini-batch, not a bad step
            return found
        try:
            found = self._finite_gradient(call, params)
        except FloatingPointError:
            torch._foreach_add_(params, previous)  # the data are to blame, not the step
            raise
        for parameter in params:
            del self.state[parameter]["previous"]
        self._probation, self._lam.streak = PROBATION, 0
        self._lam.scale(4.0**4)
        return found

    def _finite_gradient(self, call: Closure, params: list[Tensor]) -> tuple[float, list[Tensor]]:
        self._gatherer.reset()
        loss, gradients = call.gradient()
        if not math.isfinite(loss):
            raise FloatingPointError(f"The loss is {loss}; no parameter was changed. Look at the inputs and targets.")
        check_finite({self._names[id(p)]: g for p, g in zip(params, gradients, strict=True)})
        return loss, gradients

    def _check_forwards(self) -> None:
        seen = max(self._gatherer.forwards, self._gatherer.gathered)
        if seen != 1:
            raise RuntimeError(
                f"The closure called the model {seen} times in train mode with gradients; {type(self).__name__} needs "
                "one forward of the whole mini-batch, of whose outputs the loss is a function."
            )
        self._check_statistics()

    def _penalty(self, params: list[Tensor]) -> float:
        if not self._decay:
            return 0.0
        norms = torch.stack([norm.double() for norm in torch._foreach_norm(params)])
        return 0.5 * self._decay * float(norms.square().sum())

    # ---------------------------------------------------------------- directions
    @property
    def _greedy_due(self) -> bool:
        step, period = self._steps, self._greedy_every
        return period is not None and step > 0 and (step % period == 0 or (step < period and step & (step - 1) == 0))

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

    # ---------------------------------------------------------------- taking the step
    def _take(self, call: Closure, loss: float, objective: float, params: list[Tensor], proposal: Proposal) -> None:
        checked = self._probation > 0 or self._steps % self._adapt_every == 0
        rejected, actual, rho = 0, None, None
        while True:
            lam = self._lam.value
            coefficients = proposal.model.minimise(lam + self._decay)
            predicted = proposal.model.change(coefficients, lam + self._decay)
            delta = proposal.step(coefficients)
            if not checked:
                torch._foreach_add_(params, delta)
                break
            saved = [p.clone() for p in params]
            torch._foreach_add_(params, delta)
            actual = self._objective(call, params) - objective
            # Differences below the rounding of the objective say nothing.
            noise = 10 * proposal.model.noise * abs(objective)
            rho = actual / predicted if predicted < 0 and math.isfinite(actual) else -math.inf
            if actual <= noise:
                if rejected == 0 and -predicted > noise:
                    self._lam.update(rho, NEGLIGIBLE * proposal.along)
                break
            torch._foreach_copy_(params, saved)
            rejected += 1
            if rejected == TRIALS:
                raise RuntimeError(
                    f"No step lowers the loss: {TRIALS} trials up to λ = {lam:.3g} all raised it from "
                    f"{objective:.6g}. No parameter was changed. Is the likelihood that of the loss, and the "
                    "loss the same at each call?"
                )
            # Below the curvature along the step another λ changes nothing.
            self._lam.scale(max(4.0, 0.25 * proposal.along / lam))
            self._lam.streak = 0
        self._probation = PROBATION if rejected else max(self._probation - 1, 0)
        self._unchecked = None if checked else loss
        for parameter, change in zip(params, delta, strict=True):
            self.state[parameter]["previous"] = change
        self.report = StepReport(
            step=self._steps,
            loss=loss,
            objective=objective,
            predicted=predicted,
            actual=actual,
            rho=rho,
            lam=lam,
            gamma=proposal.gamma,
            alpha=-float(coefficients[0]),
            mu=float(coefficients[1]) if len(coefficients) > 1 else 0.0,
            norm=math.sqrt(max(float(coefficients @ proposal.model.squares @ coefficients), 0.0)),
            kl=0.5 * float(coefficients @ proposal.model.curvature @ coefficients),
            rejected=rejected,
        )

    def _objective(self, call: Closure, params: list[Tensor]) -> float:
        try:
            value = call.value() + self._penalty(params)
        except FloatingPointError:
            return math.inf
        return value if math.isfinite(value) else math.inf

    def _mean_eigenvalue(self) -> float:
        curvature = self._estimator.curvature()
        size = sum(shape.numel() for shape in curvature.parameter_shapes.values())
        return max(float(curvature.trace()) / size, 1e-12)

    def _calibrate(self, call: Closure, objective: float, params: list[Tensor], gradients: list[Tensor]) -> None:
        """Start from the ``λ`` whose step lowers the first loss most, among those whose model predicts it well."""
        mean = self._mean_eigenvalue()
        found: list[tuple[float, float]] = []
        known: dict[str, Inverse] = {}
        for multiple in CALIBRATION:
            lam = multiple * mean
            known = self._inverses_at(lam + self._decay, known)
            proposal = self._propose(lam + self._decay, known, params, gradients)
            coefficients = proposal.model.minimise(lam + self._decay)
            predicted = proposal.model.change(coefficients, lam + self._decay)
            saved = [p.clone() for p in params]
            torch._foreach_add_(params, proposal.step(coefficients))
            actual = self._objective(call, params) - objective
            torch._foreach_copy_(params, saved)
            if math.isfinite(actual) and actual < 0.5 * predicted < 0:
                found.append((actual, lam))
        self._lam.value = min(found)[1] if found else CALIBRATION[0] * mean
        self._gamma, self._inverses, self._calibrates = self._lam.value + self._decay, {}, False

    def pi(self) -> dict[str, float]:
        """How the damping is split over each layer's factors now: ``π`` of equation (10), a mean over groups.

        Returns:
            ``π`` by layer; layers without factors are left out.
        """
        means = {name: block.factor_means() for name, block in self.curvature().blocks.items()}
        return {n: float((m[0] / m[1]).sqrt().mean()) for n, m in means.items() if m is not None}

    # ---------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to continue bit for bit, ``λ`` and ``γ`` included.

        Returns:
            Tensors, numbers and strings only, as ``torch.load(weights_only=True)`` reads them.
        """
        own = {
            "lam": self._lam.value,
            "streak": self._lam.streak,
            "gamma": self._gamma,
            "probation": self._probation,
            "calibrates": self._calibrates,
            "unchecked": self._unchecked,
            "ceiling": self._ceiling,
        }
        return {**super().state_dict(), "adaptive": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Args:
            state_dict: From an optimiser of the same model and settings; if it does not fit, a ``ValueError`` says why
                and nothing is changed.

        Raises:
            ValueError: It is of another optimiser.
        """
        own = state_dict.get("adaptive")
        if not isinstance(own, dict) or own.keys() != STATE:
            raise ValueError(f"This is no state of {type(self).__name__}: it has no damping of its own.")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "adaptive"})
        self._lam.value, self._lam.streak = float(own["lam"]), int(own["streak"])
        self._gamma, self._probation = float(own["gamma"]), int(own["probation"])
        self._calibrates, self._ceiling = bool(own["calibrates"]), float(own["ceiling"])
        self._unchecked = None if own["unchecked"] is None else float(own["unchecked"])
