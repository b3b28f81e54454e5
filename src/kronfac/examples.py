"""Whether the rows that look like examples are examples: tried, by leaving one out, or by derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.estimator import Estimator
from kronfac.graph import saved_plainly, without_sinks
from kronfac.layers import LayerAdapter
from kronfac.measuring import couples_examples, frozen_buffers
from kronfac.operators.passes import in_eval_mode, run
from kronfac.sources import require_examples
from kronfac.sources.part import first_of, rest_of, tensors_of
from kronfac.tape import Tape

#: Examples that a batch has at least: what is left of two is one, whose dimension some models squeeze.
LEAST = 3
#: Examples that are looked at.
FEW = 4


def check_examples(
    estimator: Estimator,
    tape: Tape,
    inputs: Any,
    outputs: Tensor,
    pick: Callable[[Any], Tensor] | None,
    targets: Any = None,
) -> None:
    """Refuse rows that are as many as the examples by chance, where examples must be kept apart.

    Position indices ``[T, d]``, and sequences with time first, look like ``T`` examples where ``T`` is the batch.
    Of a few examples without the first, in eval mode, all layers must see as many rows, and the outputs must be what
    they are with it. Of a model that does not take a part of its batch (nodes of a graph), or draws random numbers in
    eval mode, too, outputs of some examples must have no derivative in the others' rows.

    Args:
        estimator: What needs the examples, or does not.
        tape: A recorded forward pass; one that does not look as if rows were examples is left to the source.
        inputs: Its batch's arguments for the model, a pair ``(tuple, dict)`` among others.
        outputs: The outputs it gave, attached to the graph.
        pick: Picks the output tensor.
        targets: Targets, where they are known: those with a mask give the rows of an example weights.

    Rows that are no examples raise a `ValueError`.
    """
    what, batch = estimator.needs_examples, len(outputs)
    weighted = estimator.likelihood.needs_targets
    if what is None and _masked(estimator, outputs, targets):
        what, weighted = "A mask", True
    if what is None or any(call.adapter.positions(call.input)[0] != batch for call in tape.calls.values()):
        return
    instead = "a loss without weights" if weighted else "approximation='kfac' with source='sampled'"
    coupled = couples_examples(estimator.model) or estimator.approximation.couples_examples
    if not _told_by_parts(estimator, tape, inputs, batch, pick, what, instead, coupled) and not coupled:
        with frozen_buffers(estimator.model):  # which what a checkpoint repeats may change
            _check_derivatives(tape, outputs, what, instead)


def _masked(estimator: Estimator, outputs: Tensor, targets: Any) -> bool:
    with suppress(TypeError, ValueError):  # of targets that the source is going to refuse
        return targets is not None and estimator.likelihood.row_weights(outputs.detach(), targets) is not None
    return False


def _told_by_parts(
    estimator: Estimator,
    tape: Tape,
    inputs: Any,
    batch: int,
    pick: Callable[[Any], Tensor] | None,
    what: str,
    instead: str,
    coupled: bool,
) -> bool:
    """Leave an example out, and refuse rows and outputs that are then others.

    Returns:
        Whether that tells anything.

    Raises:
        ValueError: They are.
    """
    model = estimator.model
    if batch < LEAST or not any(t.ndim and len(t) == batch for t in tensors_of(inputs)):
        return False
    meeting = {name for name, call in tape.calls.items() if call.met}
    size = min(FEW, batch)
    few = first_of(inputs, size, batch)
    with in_eval_mode(model), saved_plainly():
        try:
            found = run(model, {}, _copied(few), pick)
            # Calls under the model's own no_grad are of whatever it likes.
            with torch.set_grad_enabled(bool(tape.constants)), _inputs_of(estimator.adaptation.adapters) as seen:
                others = run(model, {}, rest_of(_copied(few), size), pick).detach()
        except Exception:  # whatever a model says of a part that is none, or of eval mode
            return False
        for adapter, rows in seen:
            if adapter.name not in meeting:  # has no examples, and meets them later
                require_examples(adapter, rows, size - 1, what, instead)
        if not found.ndim or len(found) != size:
            return False
        precision = _precision(model, found)
        if others.shape == found[1:].shape and (coupled or _close(others, found[1:], precision)):
            return True
        if not _close(run(model, {}, _copied(few), pick), found, precision):  # a random one tells nothing
            return False
    raise ValueError(
        f"{what} needs the examples one by one, along the first dimension of inputs and outputs; but without the "
        "first of a few, the outputs of the others are not what they were. Put the batch first, before time, or "
        f"use {instead}."
    )


def _check_derivatives(tape: Tape, outputs: Tensor, what: str, instead: str) -> None:
    """Refuse layers in whose rows of some examples the outputs of others have a derivative."""
    generator = torch.Generator().manual_seed(0)
    silent = torch.randperm(len(outputs), generator=generator)[: len(outputs) // 2].to(outputs.device)
    cotangent = torch.randn(outputs.shape, generator=generator).to(outputs)
    cotangent[silent] = 0.0
    met: list[str] = []

    def receive(name: str, pulled: Tensor) -> None:
        rows = pulled[silent]
        if rows.any() and rows.isfinite().all():  # zero times infinity says nothing
            met.append(name)

    with without_sinks(outputs):
        tape.stream(outputs, cotangent, receive)
    if met:
        raise ValueError(
            f"{what} needs the examples one by one, along the first dimension of inputs and outputs; but outputs of "
            f"some examples depend on the rows of others in layer {met[-1]!r}, as those of nodes of a graph do. Put "
            f"the batch first, before time, or use {instead}."
        )


def pick_of(value: Any, outputs: Tensor) -> Callable[[Any], Tensor] | None:
    """How the outputs are had from what the model returned.

    Args:
        value: What it returned: a tensor, a tuple, a mapping, or an object with attributes.
        outputs: A tensor.

    Returns:
        A function; None if the tensor is not among what it returned.
    """
    if value is outputs:
        return lambda found: found
    if isinstance(value, Mapping):
        return next((itemgetter(key) for key, part in value.items() if part is outputs), None)
    if isinstance(value, (tuple, list)):
        return next((itemgetter(index) for index, part in enumerate(value) if part is outputs), None)
    return next((attrgetter(key) for key, part in getattr(value, "__dict__", {}).items() if part is outputs), None)


def _copied(value: Any) -> Any:
    """Arguments that a model may change in place, as it does to its own."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) is dict:
        return {key: _copied(part) for key, part in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (tuple, list) else value


@contextmanager
def _inputs_of(adapters: Mapping[str, LayerAdapter]) -> Iterator[list[tuple[LayerAdapter, Tensor]]]:
    """Note the shapes of what layers are called with, as tensors that take no memory: a graph would lie beside another.

    Args:
        adapters: The layers.

    Yields:
        Layers and inputs, as they come.
    """
    seen: list[tuple[LayerAdapter, Tensor]] = []
    differentiates = torch.is_grad_enabled()

    def hook(adapter: LayerAdapter) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if torch.is_grad_enabled() != differentiates:
                return
            given = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.numel())
            seen.extend((adapter, torch.empty_like(value, device="meta")) for value in given)

        return note

    handles = [a.module.register_forward_hook(hook(a), with_kwargs=True) for a in adapters.values()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _precision(model: nn.Module, outputs: Tensor) -> float:
    """The coarsest precision that outputs may have gone through on their way."""
    kinds = {p.dtype for p in model.parameters()} | {outputs.dtype}
    device = outputs.device.type
    if torch.is_autocast_enabled(device):
        kinds.add(torch.get_autocast_dtype(device))
    if device != "cpu" and torch.float32 in kinds:
        kinds.add(torch.float16)  # whose fraction is as long as that of TF32
    return max(torch.finfo(kind).eps for kind in kinds if kind.is_floating_point) ** 0.5


def _close(found: Tensor, wanted: Tensor, precision: float) -> bool:
    if not found.is_floating_point():
        return True
    if found.shape != wanted.shape:
        return False
    error, size = ((t.double().norm()) for t in (found - wanted, wanted))
    return bool(error <= precision * size) or not bool(error.isfinite())
