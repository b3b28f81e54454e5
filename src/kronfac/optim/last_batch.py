"""The mini-batch that the last forward saw, whole or in part, for exact curvature products.

A part is the first examples. Assumed is that they lie along the first dimension of the outputs, and of every tensor
that the model takes whose first dimension is as long as theirs. This is not believed but tried, once for each kind of
arguments: in eval mode, the outputs of the part must be the first of those of the whole batch. Sequences that have time
first, matrices and tables that happen to be as long as the batch, heads that compare examples, and whatever else a part
would be wrong for take the whole batch: dearer, but right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.measuring import couples_examples
from kronfac.operators.passes import in_eval_mode, random_state, run
from kronfac.optim.gathering import Gatherer
from kronfac.optim.sub_batch import PLAIN, Arguments, versions_of
from kronfac.sources.part import first_of, tensors_of
from kronfac.tape import TapeError

#: Part of the mini-batch that stands for it (Martens & Grosse 2015, section 8: τ₂), and examples it has at least.
PART, FEWEST = 0.25, 250
#: Examples that a part has at least; and with batch norm in train mode, whose mean and deviation take two degrees of
#: freedom out of as many: with two examples there is no derivative left, with 32 all but a sixteenth of it.
LEAST, LEAST_COUPLED = 2, 32
#: Arguments that hold no examples.
_PLAIN = (*PLAIN, torch.dtype, torch.device)


@dataclass(frozen=True)
class LastBatch:
    """Arguments of the model's last forward, cut to their first examples.

    Attributes:
        inputs: Positional and keyword arguments. Since products run without autocast, floating-point tensors of a lower
            precision than the parameters are in theirs.
        targets: Targets, where they were captured.
        whole: What sums over the part are to be multiplied by, to stand for the whole batch.
        examples: How many outputs the part has; None for the whole batch.
    """

    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    targets: Any
    whole: float
    examples: int | None = None


def last_batch(gatherer: Gatherer, what: str, fraction: float | None = 1.0) -> LastBatch:
    """Cut a part out of the last mini-batch.

    Args:
        gatherer: Holds that forward's arguments.
        what: What needs them, for the error.
        fraction: Which part, in ``(0, 1]``, rounded up to whole examples, and to two at least, or 32 with batch norm in
            train mode; None for a quarter, but not fewer than 250 examples, and all of them where a part would see
            another function than the whole: batch norm in train mode, other dropout masks, or an argument of another
            length. It is the whole batch wherever the examples cannot be told apart along the first dimension of inputs
            and outputs.

    Returns:
        The part.

    Raises:
        RuntimeError: No forward was seen, or its arguments were changed in place since.
    """
    if gatherer.last is None:
        raise RuntimeError(
            f"{what} needs the arguments of the root module's forward to form curvature products; call the model "
            "itself in the training loop."
        )
    _check_unchanged(gatherer, gatherer.last, what)
    batch = _batch(gatherer, gatherer.last, fraction)
    part = _part(gatherer, fraction, batch)
    if part == batch:
        return LastBatch(_widened(gatherer.root, gatherer.last), gatherer.last_targets, 1.0)
    inputs = _widened(gatherer.root, first_of(gatherer.last, part, batch))
    return LastBatch(inputs, first_of(gatherer.last_targets, part, batch), batch / part, part)


def _check_unchanged(gatherer: Gatherer, arguments: Arguments, what: str) -> None:
    """Refuse arguments that are no longer what the forward saw."""
    if versions_of(*arguments) != gatherer.last_versions:
        raise TapeError(
            f"{what} needs the model's input once more in step(), but it was changed in place since the forward began: "
            "by the model, which should clone it first, or by the loop, which should leave it alone until after "
            "optimizer.step()."
        )


def _part(gatherer: Gatherer, fraction: float | None, batch: int) -> int:
    """How many examples of so many make the part."""
    coupled = couples_examples(gatherer.root)
    if fraction is not None:
        return min(max(math.ceil(batch * fraction), LEAST_COUPLED if coupled else LEAST), batch)
    return batch if coupled or _draws(gatherer) else min(max(math.ceil(batch * PART), FEWEST), batch)


def _draws(gatherer: Gatherer) -> bool:
    """Whether torch's random numbers were used since the last forward began."""
    before, now = gatherer.last_random, random_state(gatherer.root)
    return before is None or any(not torch.equal(a, b) for a, b in zip(before, now, strict=True))


# ---------------------------------------------------------------- where the examples are
def _batch(gatherer: Gatherer, arguments: Arguments, fraction: float | None) -> int:
    """How many examples there are, if they can be told apart; else 0."""
    if not _transparent(arguments):
        return 0
    sizes = list(dict.fromkeys(len(tensor) for tensor in tensors_of(arguments) if tensor.ndim > 0))
    if fraction is None and len(sizes) > 1:
        return 0  # what else the model takes may say something about each example
    if all(_part(gatherer, fraction, size) == size for size in sizes):
        return 0  # it would be the whole batch in any case
    known, kind = gatherer.lengths, _kind(arguments, sizes)
    if kind not in known:
        found = _try(gatherer, arguments, sizes, fraction)
        if found is None:
            return 0
        known[kind] = sizes.index(found) if found else None
    place = known[kind]
    batch = 0 if place is None else sizes[place]
    of_targets = [tensor for tensor in tensors_of(gatherer.last_targets) if tensor.ndim > 0]
    return batch if all(len(tensor) == batch for tensor in of_targets) else 0


def _transparent(value: Any) -> bool:
    """Whether all that a value holds can be seen, and cut."""
    if isinstance(value, Tensor):
        return value.layout == torch.strided and not value.is_nested
    if type(value) in (tuple, list):
        return all(map(_transparent, value))
    return all(map(_transparent, value.values())) if type(value) is dict else isinstance(value, _PLAIN)


def _kind(value: Any, sizes: list[int]) -> Any:
    """What arguments have in common that are cut alike: which tensors are as long as which, and settings."""
    if isinstance(value, Tensor):
        return value.ndim, sizes.index(len(value)) if value.ndim else None
    if isinstance(value, (tuple, list)):
        return tuple(_kind(part, sizes) for part in value)
    if isinstance(value, dict):
        return tuple((key, _kind(part, sizes)) for key, part in value.items())
    return type(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _try(gatherer: Gatherer, arguments: Arguments, sizes: list[int], fraction: float | None) -> int | None:
    """Run the whole batch and its part.

    Args:
        gatherer: Knows the model.
        arguments: Of the whole batch.
        sizes: First dimensions of the tensors among them.
        fraction: Which part.

    Returns:
        The number of examples; 0 if they cannot be told apart; None if these outputs do not say.
    """
    root, pick = gatherer.root, gatherer.pick
    device = next(root.parameters()).device.type
    with gatherer.paused(), in_eval_mode(root), torch.autocast(device, enabled=False):
        try:
            whole = run(root, {}, _widened(root, arguments), pick)
            batch = len(whole) if whole.ndim else 0
            part = _part(gatherer, fraction, batch)
            if batch not in sizes:
                return 0
            if part == batch:
                return None
            outputs = run(root, {}, _widened(root, first_of(arguments, part, batch)), pick)
        except Exception:  # whatever a model says of a part that is none, or of eval mode; the product itself will tell
            return 0
    if outputs.shape != (part, *whole.shape[1:]) or not whole.is_floating_point():
        return 0
    wanted = whole[:part]
    precision, wide = torch.finfo(whole.dtype).eps ** 0.5, torch.promote_types(whole.dtype, torch.float32)
    norms = [torch.linalg.vector_norm(t, dtype=wide) for t in (wanted - outputs, wanted, wanted - wanted[:1])]
    apart, size, spread = torch.stack(norms).tolist()
    if spread <= precision * size:
        return None  # outputs that are the same for all inputs, as of a head that starts at zero
    return batch if apart <= precision * size else 0


def _widened(model: nn.Module, value: Any) -> Any:
    """Arguments in the parameters' precision, if that is one, and higher than theirs: as where autocast is off."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return _cast(value, dtypes.pop()) if len(dtypes) == 1 else value


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.itemsize < dtype.itemsize else value
    if type(value) is dict:
        return {key: _cast(part, dtype) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_cast(part, dtype) for part in value)
    return value
