"""``AdaptiveKFAC``: K-FAC that chooses its own step size, momentum and damping."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from kronfac.approximations import Approximation
from kronfac.damping import Rule
from kronfac.eager import outside_of_graphs
from kronfac.likelihoods import Likelihood
from kronfac.optim.averaging import update_average
from kronfac.optim.closure import Closure
from kronfac.optim.itself import on_itself
from kronfac.optim.levenberg_marquardt import LevenbergMarquardt
from kronfac.optim.objective import PROBATION
from kronfac.optim.options import KFACOptions, at_least, several_processes
from kronfac.optim.proposal import Proposal
from kronfac.optim.proposing import Proposing
from kronfac.optim.report import StepReport
from kronfac.sources import Source

#: Trial steps of one step before it gives up; each quadruples ``λ``.
TRIALS = 20
#: Part of the curvature along the step below which ``λ`` is not lowered: it has no say there.
NEGLIGIBLE = 1e-4
#: What its own part of a state holds.
STATE = {"lam", "streak", "gamma", "probation", "calibrates", "unchecked", "ceiling"}


class AdaptiveKFAC(Proposing):
    """K-FAC whole (Grosse & Martens 2016, A.2; Martens & Grosse 2015): there is nothing to tune.

    A step is ``δ = −α Δ + μ δ_prev`` with ``Δ = (F̂ + γI)⁻¹ ∇h``; ``α`` and ``μ`` minimise the quadratic model
    ``M(δ) = h + ∇hᵀδ + ½ δᵀ(F + (λ + r)I)δ`` with the *exact* curvature ``F`` of the mini-batch, by one forward-mode
    pass (36). ``λ`` follows the reduction ratio ``ρ`` (37, 38); ``γ`` is the best of three neighbouring values every
    ``greedy_every`` steps (and of their neighbours, while the outermost is best), not below ``λ + r``.  Both are on the
    scale of the curvature.  One departure from the paper: ``γ`` stays below a hundred mean eigenvalues of ``F̂``, also
    where ``λ + r`` is above; a start at ``λ = 150`` then keeps some curvature in its directions.

    The step is taken with a closure that returns the loss **without** calling backward::

        loss = optimizer.step(lambda: F.cross_entropy(model(x), y))

    The closure must call the model once; where ``λ`` is adapted it is evaluated again at the trial point, with the same
    state of torch's random generators, so that dropout keeps its masks. On such steps a loss that rises or is not
    finite takes the step back and raises ``λ`` until it falls. In between, a loss that is not finite takes the
    step before back. A step that finds no descent at all raises a ``RuntimeError``. A step that raises, by an error in
    the closure too, leaves the parameters and ``λ`` as they were.

    A parameter that is frozen (``requires_grad=False``) while training goes on does not move; momentum starts anew.

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
        **options: ``sharing``, ``norm``, ``stats_examples``, ``stats_forward`` and ``outputs`` of
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
        if several_processes():
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
        self._ceiling = math.inf  # of γ
        self._unchecked: float | None = None  # loss before the last step, if that was not checked
        self.report: StepReport | None = None

    @property
    def _keeps_arguments(self) -> bool:
        return True

    # ---------------------------------------------------------------- step
    @outside_of_graphs
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
        self._check_members()
        self._check_settings()
        params = self._free()
        call = Closure(closure, self._gatherer.root, params)
        with self._undone_on_error(params):
            loss = self._step_in(call, params)
        if self._average is not None:
            update_average([p for p, _ in self._members()], self.state, self._average, self._steps)
        self._steps += 1
        self._gatherer.reset()
        return loss

    def _step_in(self, call: Closure, params: list[Tensor]) -> float:
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
        return loss

    # ---------------------------------------------------------------- taking the step
    def _take(self, call: Closure, loss: float, objective: float, params: list[Tensor], proposal: Proposal) -> None:
        checked = self._probation > 0 or self._steps % self._adapt_every == 0
        rejected, actual, rho = 0, None, None
        saved = self._leave(params) if checked else []
        while True:
            lam = self._lam.value
            coefficients = proposal.model.minimise(lam + self._decay)
            predicted = proposal.model.change(coefficients, lam + self._decay)
            delta = proposal.step(coefficients)
            if not checked:
                break
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
        if not checked:  # last, as there is no copy to go back to
            torch._foreach_add_(params, delta)

    # ---------------------------------------------------------------- state
    @on_itself
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

    @on_itself
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Args:
            state_dict: From an optimiser of the same model and settings; if it does not fit, a ``ValueError`` says why
                and nothing is changed.

        Raises:
            ValueError: It is of another optimiser.
        """
        own = state_dict.get("adaptive") if isinstance(state_dict, dict) else None
        if not isinstance(own, dict) or own.keys() != STATE:
            raise ValueError(f"This is no state of {type(self).__name__}: it has no damping of its own.")
        _check_choices(own)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "adaptive"})
        self._reset_settings()
        self._lam.value, self._lam.streak = float(own["lam"]), own["streak"]
        self._gamma, self._probation = float(own["gamma"]), own["probation"]
        self._calibrates, self._ceiling = own["calibrates"], float(own["ceiling"])
        self._unchecked = None if own["unchecked"] is None else float(own["unchecked"])


def _check_choices(own: dict[str, Any]) -> None:
    """Refuse what a damaged state says of the optimiser's choices, before anything is changed."""
    for name in ("lam", "gamma"):
        at_least(f"The state's {name}", own[name], 0.0, open_=True)
    at_least("The state's probation", own["probation"], 0, integer=True)
    at_least("The state's streak", own["streak"], -math.inf, integer=True)
    if own["unchecked"] is not None:
        at_least("The state's unchecked", own["unchecked"], -math.inf)
    if not (isinstance(own["ceiling"], float) and own["ceiling"] > 0) or not isinstance(own["calibrates"], bool):
        raise ValueError(f"The state's ceiling={own['ceiling']!r} or calibrates={own['calibrates']!r} is damaged.")
