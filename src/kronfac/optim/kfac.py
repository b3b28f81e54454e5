"""``KFAC``: natural gradient with Kronecker-factored curvature and momentum; KFC-pre for convolutional networks."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kronfac import processes
from kronfac.approximations import Approximation
from kronfac.approximations.joint import require_per_layer
from kronfac.blocks import Inverse
from kronfac.damping import Rule, get_rule
from kronfac.eager import eager_root, outside_of_graphs
from kronfac.estimator import Estimator
from kronfac.likelihoods import Likelihood
from kronfac.linalg.precision import without_autocast
from kronfac.optim.averaging import swapped_in, update_average
from kronfac.optim.clipping import KLClip, clip_scale
from kronfac.optim.directions import directions, multiply_plainly
from kronfac.optim.gathering import Gatherer
from kronfac.optim.health import Record
from kronfac.optim.hooks import do_nothing
from kronfac.optim.itself import on_itself
from kronfac.optim.options import KFACOptions, at_least, check_finite, check_group, complete, make_generator, with_decay
from kronfac.optim.reduced import RoundedDirections
from kronfac.optim.renewal import Renewal
from kronfac.optim.rows import RowGradients, multiply_rows
from kronfac.optim.rows_checks import check_groups, check_rows
from kronfac.optim.state import copied, gather_generators, load_curvature_state, save_curvature_state
from kronfac.optim.unit_directions import UnitDirections
from kronfac.sources import Source


class KFAC(Renewal):
    """Natural gradient descent with Kronecker factors: KFC-pre, Algorithm 1 of Grosse & Martens 2016.

    Each step forms ``v = -lr (F̂ + λI)⁻¹ ∇h``, clips it to ``vᵀFv ≤ kl_clip`` if asked to, and updates
    ``p ← momentum · p + v``, ``θ ← θ + p``.  ``F̂`` is gathered inside the model's own forward on due steps: labels are
    sampled from the model and pulled back to the layers' outputs, and the loss, ``.grad`` and the training loop are
    untouched.  The damping ``λ`` is added on the scale of the curvature: ``factored`` splits it as ``π√λ`` and
    ``√λ/π`` over the two factors (equations 9 and 10), ``exact`` adds it through the eigenvectors (39 to 44).

    Args:
        model: The module that the training loop calls.
        likelihood: The loss, e.g. ``kronfac.Categorical()``.
        lr: Learning rate ``α``.
        momentum: ``μ`` in ``[0, 1)``.
        damping: ``λ``, in units of the loss's curvature.
        weight_decay: ``r``; adds ``rθ`` to the gradient and ``r`` to the damping, unless decoupled.
        approximation: A name of ``kronfac.approximations.APPROXIMATIONS``, such as ``"kfac"``, ``"tkfac"``, ``"prong"``
            or ``"diagonal"``, or an object.
        source: ``"sampled"`` (true Fisher), ``"root"`` (by random signs), ``"exact"``, ``"empirical"``,
            ``"forward_only"``, ``"recursive"`` (KFRA's factors) or an object.
        damping_rule: ``"factored"``, ``"exact"``, ``"normal"``, ``"trace_restricted"`` or a rule.
        stats_every: Statistics period ``T_s`` in steps.
        invert_every: Inverse period ``T_f``; before it, inverses are also refreshed at steps 1, 2, 4, 8, … For EKFAC
            that of the eigenvectors: the values in their basis enter the inverses whenever statistics are gathered.
        ema: Decay of the statistics per gathered step, with bias correction.
        kl_clip: Bound ``C`` on ``vᵀFv`` in the loss's units; None for no clip; ``"auto"``: 0.01 nats for each term of
            the loss (a label, a pixel) wherever the root module's forward is seen. The exact product uses a quarter of
            the batch, on each of the first steps and then whenever statistics are due; in between the approximate value
            is corrected by the last ratio.
        average: Decay ``ξ`` of the average of iterates, in ``(0, 1)``; see :meth:`averaged`.
        fallback: Makes the optimiser of parameters without curvature, e.g. ``lambda ps: torch.optim.Adam(ps)``; by
            default they take the same step on the plain gradient.
        generator: For the sampled labels; one with a fixed seed by default.
        **options: See :class:`kronfac.optim.options.KFACOptions`.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, or the model has no layer with curvature.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        lr: float,
        *,
        momentum: float = 0.9,
        damping: float = 1e-3,
        weight_decay: float = 0.0,
        approximation: str | Approximation = "kfac",
        source: str | Source = "sampled",
        damping_rule: str | Rule = "factored",
        stats_every: int = 10,
        invert_every: int = 100,
        ema: float = 0.95,
        kl_clip: float | str | None = "auto",
        average: float | None = None,
        fallback: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        generator: torch.Generator | None = None,
        **options: Unpack[KFACOptions],
    ) -> None:
        at_least("stats_every", stats_every, 1, integer=True)
        at_least("invert_every", invert_every, 1, integer=True)
        for name, value in (("ema", ema), ("average", average)):
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value < 1):
                raise ValueError(f"{name}={value!r} must be a number in [0, 1).")
        self._options = complete(options)
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, whose forward passes are watched, not {type(model).__name__}: give "
                f"{type(self).__name__} the model in place of model.parameters(), and groups by param_groups=."
            )
        root = eager_root(model)
        device = next((p.device for p in root.parameters()), torch.device("cpu"))
        self._estimator = Estimator(
            root,
            likelihood,
            approximation=approximation,
            source=source,
            sharing=self._options["sharing"],
            norm=self._options["norm"],
            generator=make_generator(generator, device),
        )
        require_per_layer(self._estimator.approximation, type(self).__name__)
        self._rule = get_rule(damping_rule)
        self._periods, self._ema, self._average = (stats_every, invert_every), ema, average
        self._steps, self._parallel = 0, processes.wrapper_of(model)
        self._group = processes.group_of(self._parallel)
        self._inverses: dict[str, Inverse] = {}
        plain = inspect.unwrap(type(self).step) is inspect.unwrap(KFAC.step)  # PyTorch wraps the step of each class
        self._check_renewal(plain=plain)
        self._rounded = RoundedDirections() if self._options["products"] == "bfloat16" else None
        self._units, self._rows = UnitDirections(), None
        rows = self._options["gradients"] == "rows"
        if rows:
            check_rows(model, self._estimator.adaptation.adapters)
        self._pending, self._record, self._clip = None, Record(), KLClip()
        self._generators: list[Tensor] | None = None
        self._names = {id(p): name for name, p in root.named_parameters()}
        self._fallback = self._make_fallback(root, fallback)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "weight_decay": weight_decay,
            "kl_clip": kl_clip,
            "decoupled_weight_decay": self._options["decoupled_weight_decay"],
        }
        check_group(defaults)
        super().__init__(self._groups(root), defaults)
        if rows:
            check_groups(self._own_groups)
        if self._fallback is not None:
            # The very same groups, so that schedulers, zero_grad and GradScaler reach them too.
            self.param_groups.extend(self._fallback.param_groups)
        # An optimiser that was dropped, or refused its arguments, must hear of no forward.
        me, forget = weakref.ref(self), weakref.WeakMethod(self._forget)
        self._itself = me
        self._gatherer = Gatherer(
            model,
            self._estimator,
            due=lambda: (own := me()) is not None and own._stats_due,
            begin=lambda: (forget() or do_nothing)(),
            outputs=self._options["outputs"],
            keep=lambda: (own := me()) is not None and own._keeps_arguments,
            examples=self._options["stats_examples"],
            own_forward=self._options["stats_forward"] == "own",
        )
        if rows:
            self._rows = RowGradients(self._estimator.adaptation.adapters, self._gatherer)

    # ---------------------------------------------------------------- step
    @outside_of_graphs
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Optional; evaluates the model, calls backward and returns the loss.

        Returns:
            The closure's loss, or None.

        A gradient that is NaN or Inf stops it with a ``FloatingPointError``, and statistics that were due but never
        gathered with a ``RuntimeError``; no parameter is changed then.  A closure that leaves no gradients and returns
        None, or a loss without a graph, as training frameworks' do for a batch that is to be skipped, leaves the step
        out, with a warning.
        """
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None if closure is None else self._evaluate(closure)
        if closure is None or self._any_gradient:
            processes.refuse_join(self._parallel)
            with processes.of(self._group):
                self._advance()
        else:
            self._leave_out()
        return loss

    @without_autocast  # which a loop may have left on around step()
    def _advance(self) -> None:
        self._check_members()
        everything = [p for group in self.param_groups for p in group["params"]]
        if self._fallback is not None:
            check_finite({self._names[id(p)]: p.grad for p in everything if p.grad is not None})
        self._check_statistics()
        self._renew_inverses()
        self._move({self._names[id(p)]: p.grad for p, _ in self._members() if p.grad is not None})
        if self._fallback is not None:
            self._fallback.step()
        if self._average is not None:
            update_average(everything, self.state, self._average, self._steps)
        self._steps += 1
        self._generators = None
        self._gatherer.reset()

    def _move(self, gradients: dict[str, Tensor]) -> None:
        members = [(self._names[id(p)], p, group) for p, group in self._members() if self._has_gradient(p)]
        for name, parameter, group in members:
            if group["weight_decay"] and not group["decoupled_weight_decay"]:
                gradients[name] = with_decay(gradients[name], parameter, group["weight_decay"])
        moved = self._directions(gradients)
        check_finite(gradients, moved)
        scale = self._clip_scale(gradients, moved, members)
        for group in self._own_groups:
            params = [p for p in group["params"] if self._names[id(p)] in moved]
            if not params:
                continue
            moves = [moved[self._names[id(p)]] for p in params]
            rate = -group["lr"] * scale
            if group["weight_decay"] and group["decoupled_weight_decay"]:
                torch._foreach_mul_(params, 1.0 - group["lr"] * group["weight_decay"])
            if group["momentum"]:
                buffers = [self._buffer(p, "momentum_buffer") for p in params]
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, moves, alpha=rate)
                torch._foreach_add_(params, buffers)
            else:
                torch._foreach_add_(params, moves, alpha=rate)

    @without_autocast
    def _directions(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        adapters = self._with_curvature()
        rounded = self._rounded
        multiply = multiply_plainly if rounded is None else rounded.multiply
        moved, done = self._units(adapters, self._inverses, gradients)
        if self._rows is not None:
            check_groups(self._own_groups)
            by_rows = multiply_rows if rounded is None else rounded.by_rows
            found, layers = self._rows.directions(self._inverses, gradients, by_rows)
            moved, done = moved | found, done | layers
        others = {name: adapter for name, adapter in adapters.items() if name not in done}
        return directions(others, self._inverses, gradients, multiply) | moved

    @property
    def _keeps_arguments(self) -> bool:
        return self._clips and self._exact_clip_due

    @property
    def _exact_clip_due(self) -> bool:
        return self._clip.ratio is None or self._steps % self._periods[0] == 0 or self._steps < self._options["burn_in"]

    def _rates(self, members: list[tuple[str, nn.Parameter, Any]]) -> dict[str, float]:
        """What each direction is multiplied by, by parameter name, before the clip."""
        return {name: float(group["lr"]) for name, _, group in members}

    def _clip_scale(
        self, gradients: dict[str, Tensor], moved: dict[str, Tensor], members: list[tuple[str, nn.Parameter, Any]]
    ) -> float:
        if not self._clips:
            return 1.0
        due, pick, rates = self._exact_clip_due, self._options["outputs"], self._rates(members)
        return clip_scale(self._clip, self._gatherer, members, gradients, moved, rates, due, pick)

    def averaged(self) -> AbstractContextManager[None]:
        """Swap the averaged parameters in.

        Returns:
            A context manager; the parameters are back as they were at its end.

        Raises:
            RuntimeError: The optimiser was made without ``average=``.
        """
        if self._average is None:
            raise RuntimeError("averaged() needs an optimiser made with average=, e.g. average=0.99.")
        return swapped_in([p for group in self.param_groups for p in group["params"]], self.state)

    # ---------------------------------------------------------------- PyTorch's conventions
    @on_itself
    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to continue bit for bit: factors, inverses and generator included.

        In a distributed run every process calls :meth:`consolidate_state_dict` first.  Call it between a step and the
        next forward: the statistics of a forward whose step is to come are in the state, but its gradients are not.

        Returns:
            Tensors, numbers and strings only, as ``torch.load(weights_only=True)`` reads them.
        """
        return {**copied(super().state_dict()), "kronfac": save_curvature_state(self)}

    @on_itself
    def consolidate_state_dict(self) -> None:
        """Let one process's ``state_dict()`` speak for all of a distributed run; every process must call this.

        Statistics are summed over processes and shared out evenly, which changes no curvature, and the state holds the
        generators of all processes. Call it again before each save.
        """
        with processes.of(self._group):
            self._estimator.consolidate()
            self._generators = gather_generators(self._estimator)

    @on_itself
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Args:
            state_dict: From an optimiser of the same model and settings; if it does not fit, a ``ValueError`` says why
                and nothing is changed.
        """
        with processes.of(self._group):
            apply = load_curvature_state(self, state_dict)
        super().load_state_dict({key: copied(value) for key, value in state_dict.items() if key != "kronfac"})
        apply()
        if self._fallback is not None:
            theirs = iter(self._fallback.param_groups)
            self.param_groups = [group if "kl_clip" in group else next(theirs) for group in self.param_groups]
