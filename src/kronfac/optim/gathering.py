"""Statistics gathered inside the model's own forward, by hooks on its root module."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kronfac.eager import eagerly, has_compiled_parts, heard_root
from kronfac.estimator import Estimator
from kronfac.forwards import pick_outputs
from kronfac.graph import in_backward, saved_plainly, without_sinks
from kronfac.measuring import is_apart_from_training
from kronfac.operators.passes import random_state, run, same_random_state
from kronfac.optim.held import Held
from kronfac.optim.hooks import WeakHook, do_nothing, in_compiled_region, remove
from kronfac.optim.returned import Returned
from kronfac.optim.root import identities, kept_statistics
from kronfac.optim.sub_batch import Plan, check_fits, part_of, versions_of
from kronfac.optim.trial import Trial
from kronfac.sources.part import Part
from kronfac.tape import Tape, TapeError, record


def _may_be_training() -> bool:
    written_down = torch.jit.is_tracing() or torch.compiler.is_exporting()
    return torch.is_grad_enabled() and not (written_down or is_apart_from_training())


def _remove(handles: list[RemovableHandle], tape: Tape) -> None:
    remove(handles)
    tape.close()  # the collector may come in the middle of a forward, whose end then nobody hears of


def _require_calls(tape: Tape) -> None:
    if tape.empty:
        raise TapeError(
            "No layer was called with any rows, so that there are no statistics: the batch is empty. Leave it out."
        )
    if not tape.calls:
        raise TapeError(
            "No layer hook fired: either the forward calls none of the layers, or all of them under torch.no_grad(), "
            "or it was compiled before. Pass the module that torch.compile returned to the optimiser."
        )


class Gatherer:
    """Feeds an estimator from the forwards of a model.

    Args:
        model: The module the training loop calls.
        estimator: Takes the statistics; built on :func:`kronfac.eager.eager_root` of the model.
        due: Says whether this forward's statistics are wanted.
        begin: Called once before the first statistics of a step.
        outputs: Picks the output tensor.
        keep: Says whether this forward's arguments are needed after it.
        examples: How many examples of a forward statistics are of at most; None for all.
        own_forward: Whether statistics of all examples take a forward of their own, before that of training.

    Attributes:
        gathered: Number of forwards gathered since :meth:`reset`.
        forwards: Number of forwards with gradients seen since :meth:`reset`.
        last: Arguments of the last forward that carried gradients, for curvature products.
        last_versions: Versions of the tensors among them before it, to notice a later change in place.
        last_random: Random state before it, so that products see the same dropout masks.
        measuring: Whether cotangents are being pulled for statistics.
        beside: Further estimators of the same model that take each forward too.
        lengths: Which length was found to be the batch's, by the kind of arguments (:mod:`kronfac.optim.last_batch`).
        pick: Picks the output tensor.
        reached: Layers that the outputs of the step's forwards depend on.
        unreached: Layers that the last statistics were of although the likelihood's outputs do not depend on them.
    """

    def __init__(
        self,
        model: nn.Module,
        estimator: Estimator,
        due: Callable[[], bool],
        begin: Callable[[], None],
        outputs: Callable[[Any], Tensor] | None,
        keep: Callable[[], bool],
        examples: int | None = None,
        own_forward: bool = False,
    ) -> None:
        check_fits(examples, estimator)
        model = heard_root(model)
        self.model, self.root, self.estimator = model, estimator.model, estimator
        self.gathered, self.forwards, self.enabled, self._capturing = 0, 0, True, False
        self.measuring, self._returned = False, Returned(self.root, self._trains)
        self.last: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.last_versions: tuple[int, ...] = ()
        self.last_targets: Any = None
        self.last_random: tuple[Tensor, ...] | None = None
        self.beside: list[Estimator] = []
        self.reached: set[str] = set()
        self.unreached: set[str] = set()
        self.lengths: dict[Any, int | None] = {}
        self._due, self._begin, self.pick, self._keep = due, begin, outputs, keep
        self._examples = examples
        self._plan: Plan | None = None  # of the forward that is under way
        self.trial = Trial(estimator, outputs, self._measuring)
        self._held = Held(next(self.root.parameters()).device.type)
        self._tape = Tape(estimator.adaptation.adapters)
        self._identities = identities(self.root)
        self._own_forward = own_forward
        handles = [
            model.register_forward_pre_hook(WeakHook(self, "_before", model), with_kwargs=True),
            model.register_forward_hook(WeakHook(self, "_after", model), with_kwargs=True, always_call=True),
        ]
        self._last_hook = handles[1].id
        weakref.finalize(self, _remove, handles, self._tape)

    def reset(self) -> None:
        """Start counting for the next step."""
        self.gathered, self.forwards = 0, 0
        self._returned.reset()
        self.last = self.last_targets = self.last_random = None

    @property
    def wanted(self) -> bool:
        """Whether a forward now would be one of training."""
        return self.enabled and self.root.training and _may_be_training()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Gather nothing within the block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @contextmanager
    def capture(self) -> Iterator[Callable[..., None]]:
        """Gather by hand: yields a function to be called with the outputs, and targets where they are needed."""
        if not (self.enabled and _may_be_training() and self._due()):
            yield do_nothing
            return
        self.check_layers()
        self._forget_abandoned()
        # Other optimisers of the model hear of this forward as of any.
        tape = Tape(self.estimator.adaptation.adapters)
        with self.paused(), self._keeping(), eagerly():
            tape.open()

            def gather(outputs: Tensor, targets: Any = None) -> None:
                if not tape.is_open:
                    raise TapeError(
                        "capture was called twice in one context: the loss of a forward is one likelihood of one "
                        "tensor of outputs. Put several heads together, or use a context for each forward."
                    )
                tape.close()
                picked = pick_outputs(outputs, self.pick)
                part = part_of(self._examples, picked)
                self.trial.captured(tape, picked, targets)
                self._held(lambda: self._update(tape, picked, targets, part))
                self._returned.watch(picked)

            try:
                yield gather
            finally:
                tape.close()

    def held_back(self) -> AbstractContextManager[Callable[[], None]]:
        """Let the statistics of forwards within the block wait; those that were not asked for by its end are dropped.

        Returns:
            A context manager that gives what takes them in; to be called before the graph is freed.
        """
        self.reset()
        return self._held.back(self._drop)

    @property
    def reads_graph(self) -> bool:
        """Whether statistics that wait are read from the graph of the training forward."""
        return self._held.reads

    def _drop(self) -> None:
        self._tape.forget()
        self.reset()

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Keep the arguments of a forward within the block although nothing is gathered from it."""
        before, self._capturing = self._capturing, True
        try:
            yield
        finally:
            self._capturing = before
            self.trial.forget()

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward():
            return
        counts = self.wanted
        if counts:
            self._forget_abandoned()
            self._come_last()
        if (counts or (self._capturing and _may_be_training())) and self._keep():
            self.last, self.last_random = (args, kwargs), random_state(self.root)
            self.last_versions = versions_of(args, kwargs)
        if not counts:
            return
        self.forwards += 1
        if not self._due():
            return
        self.check_layers()
        likelihood, source = self.estimator.likelihood, self.estimator.source
        for name, needs in ((repr(likelihood), likelihood.needs_targets), (source.name, source.needs_targets)):
            if needs:
                raise TapeError(
                    f"{name} needs the targets, which the model's forward does not see. Write\n"
                    "    with optimizer.capture() as capture:\n        z = model(x)\n        capture(z, y)"
                )
        plan = Plan.of(self._examples, self.estimator, args, kwargs)
        # Compiled code ignores hooks that are added to it.
        own = self._own_forward or in_compiled_region() or has_compiled_parts(self.model)
        if own and not plan.apart:
            # Before the training forward, or, if it waits, after its backward: it shares no memory with its graph.
            state = random_state(self.root)
            self._held(lambda: self._run_again(plan, state=state), reads=False)
            return
        self._plan = plan
        if not plan.apart:
            self._tape.open()

    def _after(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if is_apart_from_training() or in_backward():
            return
        plan, self._plan = self._plan, None
        self._tape.close()
        if output is None:  # the forward raised
            return
        if self._capturing and _may_be_training():
            self.trial.note((args, kwargs), output)
        if plan is None:  # nothing was due, or it was gathered before
            if self.gathered and self.wanted:
                self._returned.watch(pick_outputs(output, self.pick))
            return
        picked = pick_outputs(output, self.pick)
        self._returned.watch(picked)
        if plan.apart:
            self._held(lambda: self._run_again(plan, picked), reads=False)
            return
        _require_calls(self._tape)
        self.trial(self._tape, (args, kwargs), picked)
        self._held(lambda: self._take(picked, plan.part_of(picked)))

    def _take(self, outputs: Tensor, part: Part | None) -> None:
        self._update(self._tape, outputs, None, part)
        self._tape.forget()

    def _trains(self) -> bool:
        """Whether a derivative is one of the training, and not a pull for statistics."""
        return not self.measuring

    def _forget_abandoned(self) -> None:
        """Start counting anew if the gradients of what was gathered are gone although no step was taken."""
        # GradScaler skips steps whose gradients are not finite, and a step may refuse its own.
        if self._returned.gone():
            self.reset()

    def _come_last(self) -> None:
        """See the outputs after all other hooks of the root, those that were registered later too."""
        hooks = self.model._forward_hooks
        if next(reversed(hooks)) != self._last_hook:
            hooks[self._last_hook] = hooks.pop(self._last_hook)

    def _run_again(self, plan: Plan, whole: Tensor | None = None, *, state: tuple[Tensor, ...] | None = None) -> None:
        """Run the eager module for the statistics alone, on a part of the batch, whose whole outputs are given, or all.

        The random state is the given one, that of the training forward, or the present one.  Its buffers are copies. To
        put their values back would be a change in place, which the backward of the training forward, by which they were
        saved, does not forgive.
        """
        with same_random_state(self.root, state):
            with record(self.estimator.adaptation.adapters) as tape, saved_plainly():
                inputs = plan.inputs()
                outputs = run(self.root, {}, inputs, self.pick)
            _require_calls(tape)
            self.trial(tape, inputs, outputs)
            if whole is None:
                plan.check_inputs()
            else:
                plan.check(outputs, whole)
            tape.disposable = not self.beside
            self._update(tape, outputs, None, plan.part_of(outputs))

    def _update(self, tape: Tape, outputs: Tensor, targets: Any, part: Part | None) -> None:
        if self.gathered == 0:
            self._begin()
            self.reached, self.unreached = set(), set()
        missed = tape.unreached(outputs)
        self.reached |= set(tape.calls) - missed
        self.unreached = (self.unreached | missed) - self.reached
        with self._measuring(), saved_plainly(), kept_statistics(self.root), without_sinks(outputs):
            for estimator in (self.estimator, *self.beside):
                estimator.update(tape, outputs, targets, continues=self.gathered > 0, part=part)
        self.gathered += 1
        self.last_targets = targets

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        self.measuring = True
        try:
            yield
        finally:
            self.measuring = False

    def check_layers(self) -> None:
        """Refuse a model whose modules or parameters are no longer those of the construction, or cast or moved.

        Raises:
            TapeError: They are not.
        """
        if identities(self.root) != self._identities:
            raise TapeError(
                "The model's layers or parameters were replaced, cast or moved after the optimiser was constructed: "
                "construct a new one. If torch.func.functional_call replaces them for one forward, gather nothing of "
                "it, inside `with optimizer.paused():`, or gather by hand, by optimizer.capture()."
            )
