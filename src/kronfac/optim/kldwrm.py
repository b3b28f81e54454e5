"""``KLDWRM``: steps regularised by the Kullback-Leibler divergences from all distributions before (Puiu 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.approximations import Approximation
from kronfac.eager import outside_of_graphs
from kronfac.likelihoods import Likelihood
from kronfac.optim.averages import Averages
from kronfac.optim.closure import Closure, evaluated
from kronfac.optim.exact_wake import ExactWake, Networks
from kronfac.optim.iterative_sum import IterativeSum
from kronfac.optim.itself import on_itself
from kronfac.optim.kldwrm_checks import (
    check_blocks,
    check_cap,
    check_choices,
    check_groups,
    check_likelihood,
    check_model,
    check_numbers,
)
from kronfac.optim.kldwrm_state import follow, free_parameters, load_wake, save_wake, still_products
from kronfac.optim.options import check_finite, with_decay
from kronfac.optim.wake import Damped, WakeAverage, layer_product, layer_scales


class KLDWRM(Averages):
    """KL-divergence wake-regularised models: SO-, Q- and QE-KLD-WRM (Puiu 2022).

    Step ``k`` minimises a model of the loss plus ``λ Σ_i κ(i) ρ^{k−i} D(θ_i, θ_k + s)``: it stays near the
    distributions of *all* iterates before, not of the last alone. With ``D ≈ ½ dᵀF_i d`` the solution is

    ``s_k = −(1/λ) [F̄_k + B_k/λ]⁻¹ ĝ_k``,  ``ĝ_k = g_k + λ_k ρ u_{k−1}``,  ``u_k = ρ u_{k−1} + F̄_k s_k``

    with the average ``F̄_k = ρ F̄_{k−1} + (1 − ρ) F_k``, ``F̄_0 = F_0``. This is Proposition 4.1 for ``B = 0``
    (``"so"``: ``ĝ_k = g_k − ρ g_{k−1}`` while steps are neither clipped nor carry momentum) and 4.2 for ``B_k = F_k``
    (``"q"``), for any ``λ_k``, and stays right for whatever step ``s_k`` was taken. ``"qe"`` starts there and goes on
    with the exact symmetric divergences of the last ``n_cap`` networks (31), by gradient descent within the step.

    ``F`` is the damped curvature everywhere. Statistics are averaged and inverted together, every ``stats_every``
    steps; in between ``F_k`` and ``B_k`` are ``F̄`` (20).  The learning rate of the groups **is** ``1/λ``: any scheduler
    drives ``λ``.

    ``"so"`` and ``"q"`` take the place of any optimiser in a loop. ``"qe"`` takes a closure that evaluates the model
    once and returns the loss **without** calling backward: ``optimizer.step(lambda: loss_function(model(x), y))``.

    Args:
        model: The module that the training loop calls.
        likelihood: The loss, e.g. ``kronfac.Categorical()``.
        lam: ``λ``, strength of the wake; the groups' ``lr`` is ``1/λ``.
        variant: ``"so"``, ``"q"`` or ``"qe"``.
        rho: ``ρ`` in ``[0, 1)``: decay of the wake and of the average.
        solve: For ``"q"`` and ``"qe"``: ``"stein"`` solves with ``F̄ + B/λ`` exactly, ``"reweighted"`` takes the
            Kronecker product of re-weighted factors (82, 83, corrected), and ``"iterative"`` solves by conjugate
            gradients whatever has no closed solve.
        model_approximation: Structure of ``B_k`` where it is not that of ``F`` (future work (c) of the paper): a name
            or object as for ``approximation``, with ``solve="iterative"`` and ``stats_every=1``.
        omega: ``ω``; the learning rate within a QE step is ``ω/λ`` for a mean over terms, less for their sum.
        n_inner: ``N_IS``, iterations within a QE step.
        n_cap: ``N_CAP``, networks that a QE step looks at, the present one included; by default the least number with
            ``ρ^n_cap < 0.1``.
        zeta: Factor of the exact divergences in a QE step; the paper's 1/330 by default.
        xi: ``ξ`` in ``[0, 1]``: weight of ``D(θ_i ‖ θ_k + s)`` in a QE step, ``1 − ξ`` being that of the converse
            (footnote 12); 0.5 is the symmetric divergence.
        stats_every: Period in steps of statistics and inverses.
        momentum: In ``[0, 1)``; of the steps, not of the gradients.
        kl_clip: Bound on ``vᵀFv`` as for :class:`kronfac.optim.KFAC`, or None.
        kl_product: ``"exact"`` curvature products for that bound, or the ``"approximate"`` ``vᵀĝ`` (7.1, first rule).
        rms_clip: ``τ``: a layer's step whose root mean square is larger is scaled down to it (7.1, second rule).
        **options: ``damping``, ``weight_decay``, ``approximation``, ``source``, ``damping_rule``, ``average``,
            ``fallback``, ``generator`` and :class:`kronfac.optim.options.KFACOptions`, as for
            :class:`kronfac.optim.KFAC`.

    Attributes:
        inner_objectives: Of the last QE step: the objective (31) over ``λ`` at each iterate within it, start included.

    Raises:
        TypeError: An argument is of the wrong type or fixed by the method.
        ValueError: An argument is out of range, or the algebra has no place for it.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        lam: float = 100.0,
        *,
        variant: str = "so",
        rho: float = 0.5,
        solve: str = "stein",
        model_approximation: str | Approximation | None = None,
        omega: float = 0.07,
        n_inner: int = 10,
        n_cap: int | None = None,
        zeta: float = 1 / 330,
        xi: float = 0.5,
        stats_every: int = 10,
        momentum: float = 0.0,
        kl_clip: float | str | None = "auto",
        kl_product: str = "exact",
        rms_clip: float | None = None,
        **options: Any,
    ) -> None:
        if fixed := sorted({"lr", "ema", "invert_every"} & options.keys()):
            raise TypeError(f"KLDWRM takes no {' and '.join(fixed)}: lr is 1/lam, ema rho, invert_every stats_every.")
        check_choices(variant=variant, solve=solve, kl_product=kl_product)
        check_numbers(lam, rho, omega, n_inner, zeta, xi, rms_clip)
        n_cap = check_cap(n_cap, rho, warn=variant == "qe")
        if variant == "qe":
            check_likelihood(likelihood, momentum, options, stats_every, xi)
        if model_approximation is not None:
            check_model(variant, solve, stats_every)
        self._variant, self._rho, self._solve = variant, float(rho), solve
        self._inner, self._zeta, self._xi = (float(omega), n_inner), float(zeta), float(xi)
        self._kl_product, self._rms_clip = kl_product, rms_clip
        super().__init__(
            model,
            likelihood,
            1.0 / lam,
            momentum=momentum,
            stats_every=stats_every,
            invert_every=stats_every,
            ema=rho,
            kl_clip=kl_clip,
            **options,
        )
        check_blocks(self._estimator, variant, solve, self._rule)
        self._second = None if model_approximation is None else self._beside(model_approximation, options)
        self._wake = WakeAverage(self._estimator.statistics, self._rho)
        self._networks = Networks(self._rho, n_cap)
        self._dampings: dict[str, float] = {}
        self._averages: dict[str, Damped] = {}
        self._model: dict[str, Damped] = {}
        self._sums = False  # whether the inverses are those of F̄ + B/λ, not of F̄
        self.inner_objectives: list[float] = []
        self._lent = False  # whether .grad holds what the optimiser itself computed

    # ---------------------------------------------------------------- step
    @outside_of_graphs
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Evaluates the model once and returns the loss, without calling backward. Other variants than
                ``"qe"`` take one that does, too, or none.

        Returns:
            The closure's loss, or None.

        What is not finite stops it with a ``FloatingPointError``, statistics that are missing with a ``RuntimeError``;
        neither parameters nor averages are changed then.
        """
        try:
            return self._step_exactly(closure) if self._variant == "qe" else self._step(closure)
        except BaseException:
            self._gatherer.reset()  # what was gathered is used up or wrong
            self._undo()
            raise

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        params = [p for p, _ in self._members()]
        for parameter in params if self._lent else ():
            parameter.grad = None
        loss, self._lent = evaluated(closure, params)
        return loss

    def _step_exactly(self, closure: Callable[[], Any] | None) -> float:
        self._gatherer.check_layers()
        params = free_parameters(self)
        call = Closure(closure, self._gatherer.root, params)
        self._gatherer.reset()
        value = call.evaluate()
        loss = float(value)
        if not math.isfinite(loss):
            raise FloatingPointError(f"The loss is {loss}; no parameter was changed. Look at the inputs and targets.")
        for parameter, gradient in zip(params, call.differentiate(value), strict=True):
            parameter.grad = gradient
        try:
            self._step(None)
            return loss
        finally:
            for parameter in params:
                parameter.grad = None

    def _rates(self, members: list[tuple[str, nn.Parameter, Any]]) -> dict[str, float]:
        return {name: 1.0 for name, _, _ in members}  # 1/λ is in the gradients already

    @property
    def _exact_clip_due(self) -> bool:
        return self._kl_product == "exact" and super()._exact_clip_due

    @property
    def _keeps_arguments(self) -> bool:
        return self._variant == "qe" or super()._keeps_arguments

    def _move(self, gradients: dict[str, Tensor]) -> None:
        members = [(self._names[id(p)], p, group) for p, group in self._members() if p.grad is not None]
        gradients = {name: g.to_dense() if g.is_sparse else g for name, g in gradients.items()}  # as the wake is
        scaled = {}  # ĝ/λ = g/λ + ρ u
        for name, parameter, group in members:
            if group["weight_decay"] and not group["decoupled_weight_decay"]:
                gradients[name] = with_decay(gradients[name], parameter, group["weight_decay"])
            scaled[name] = gradients[name] * group["lr"]
            if "wake" in self.state[parameter]:
                scaled[name].add_(self.state[parameter]["wake"], alpha=self._rho)
        directions = self._solved(scaled, members)
        check_finite(gradients, directions)
        clip = self._clip_scale(scaled, directions, members)
        scales = layer_scales(self._estimator.adaptation.adapters.values(), directions, clip, self._rms_clip)
        moves = {name: -scales[name] * found for name, found in directions.items()}
        carried = {name: part for name, p, group in members if (part := self._carried(p, group)) is not None}
        if self._variant == "qe":
            moves = self._refined(gradients, moves, members)
        products = self._wake_products(scaled, scales, moves, carried)
        if self._rho:
            products |= still_products(self, moves, carried)
        self._wake.commit()  # from here on the step is taken
        if self._variant == "qe":  # with those that are frozen now: they may move again
            self._networks.push({self._names[id(p)]: p for p, _ in self._members()}, first=self._steps == 0)
        for name, parameter, group in members:
            if group["momentum"]:
                self._buffer(parameter, "momentum_buffer").mul_(group["momentum"]).add_(moves[name])
            parameter.add_(moves[name])
            if name in carried:
                parameter.add_(carried[name])
        if self._rho:
            follow(self, products)

    def _carried(self, parameter: Tensor, group: dict[str, Any]) -> Tensor | None:
        """The part of a step that is no solution of this step's problem: momentum and decoupled weight decay."""
        parts = []
        if group["momentum"] and "momentum_buffer" in self.state[parameter]:
            parts.append(self.state[parameter]["momentum_buffer"] * group["momentum"])
        if group["weight_decay"] and group["decoupled_weight_decay"]:
            parts.append(parameter * (-group["lr"] * group["weight_decay"]))
        return sum(parts[1:], parts[0]) if parts else None

    # ---------------------------------------------------------------- exact divergences
    def _refined(
        self, gradients: dict[str, Tensor], start: dict[str, Tensor], members: list[tuple[str, nn.Parameter, Any]]
    ) -> dict[str, Tensor]:
        """Gradient descent on (31) from the Q step."""
        rate = check_groups([group for _, _, group in members])
        if self._gatherer.forwards > 1 or self._gatherer.gathered > 1 or self._gatherer.last is None:
            raise RuntimeError(
                "variant='qe' needs one forward of the whole mini-batch in train mode, of whose outputs the loss is a "
                f"function; the closure called the model {self._gatherer.forwards} times."
            )
        parameters = {name: p.detach() for name, p, _ in members}

        def product(vector: dict[str, Tensor]) -> dict[str, Tensor]:
            out = dict(vector)
            for layer in self._inverses:
                matrix = self._model[layer] if layer in self._model else self._average_of(layer)
                adapter = self._estimator.adaptation.adapters[layer]
                own = {n: vector[n] for n in adapter.parameter_names if n in vector}
                out |= layer_product(adapter, matrix, own) if own else {}
            return {name: out[name] for name in vector}

        problem = ExactWake(
            self._gatherer,
            self._estimator.likelihood,
            self._options["outputs"],
            parameters,
            self._networks.weighted(parameters, first=self._steps == 0, zeta=self._zeta),
            gradients,
            product,
            rate,
            self._xi,
        )
        omega, iterations = self._inner
        with self._gatherer.paused():
            steps, self.inner_objectives = problem.descend(start, omega, iterations)
        check_finite(gradients, steps)
        scales = layer_scales(self._estimator.adaptation.adapters.values(), steps, 1.0, self._rms_clip)
        return {name: scales[name] * step for name, step in steps.items()}

    # ---------------------------------------------------------------- state
    @on_itself
    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to continue bit for bit, the wake and the old networks included.

        Returns:
            Tensors, numbers and strings only, as ``torch.load(weights_only=True)`` reads them.
        """
        mine = self._inverses
        # An iterative solve is of one step alone: the next one makes its own, from the averages.
        self._inverses = {name: i.base if isinstance(i, IterativeSum) else i for name, i in mine.items()}
        try:
            with self._wake.in_place():
                return {**super().state_dict(), "kldwrm": save_wake(self)}
        finally:
            self._inverses = mine

    @on_itself
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Args:
            state_dict: From an optimiser of the same model and settings; if it does not fit, a ``ValueError`` says why
                and nothing is changed.
        """
        apply = load_wake(self, state_dict)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "kldwrm"})
        apply()
