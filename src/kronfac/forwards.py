"""Batches and forwards as users hand them in: loaders, inputs of several kinds, outputs that are no tensor."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a tensor, a tuple or list of arguments, or a mapping of keyword arguments.

    Args:
        model: The model.
        inputs: Its input.

    Returns:
        What the model returns.
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def pick_outputs(value: Any, pick: Callable[[Any], Tensor] | None) -> Tensor:
    """Return the output tensor.

    Args:
        value: What the model returned.
        pick: The user's ``outputs=``.

    Returns:
        The tensor.

    Raises:
        TypeError: It is none.
    """
    out = value if pick is None else pick(value)
    if not isinstance(out, Tensor):
        raise TypeError(
            f"The model's outputs are of type {type(out).__name__}, not a tensor; say which tensor is meant, e.g. "
            "outputs=lambda out: out.logits."
        )
    return out


def batches_of(loader: Iterable[Any] | tuple[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Iterate over ``(inputs, targets)``; a single pair counts as one batch.

    Args:
        loader: Iterable of pairs, or a pair ``(inputs, targets)``. What could be two pairs counts as two.

    Yields:
        Pairs.

    Raises:
        TypeError: It is not iterable, or an entry is no pair.
    """
    if not isinstance(loader, Iterable):
        raise TypeError(f"loader must be an iterable of pairs (inputs, targets), not {type(loader).__name__}.")
    for batch in [loader] if _is_pair(loader) else loader:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(f"loader must give pairs (inputs, targets), not {type(batch).__name__}.")
        yield batch[0], batch[1]


def _is_pair(loader: Any) -> bool:
    """Whether this is one batch: its first entry is no batch, or its second, a tensor or None, is none."""
    if not isinstance(loader, (tuple, list)) or len(loader) != 2:
        return False
    inputs, targets = loader
    several = isinstance(inputs, (tuple, list)) and (targets is None or isinstance(targets, Tensor))
    return several or isinstance(inputs, (Tensor, Mapping))


def with_progress(pairs: Iterator[tuple[Any, Any]], loader: Any, show: bool) -> Iterator[tuple[Any, Any]]:
    """Show a progress bar while batches are gone through; rich's where it is installed.

    Args:
        pairs: The batches.
        loader: Where they come from; its length is the total, where it has one.
        show: Whether to show anything.

    Yields:
        The batches.
    """
    if not show:
        yield from pairs
        return
    total = len(loader) if hasattr(loader, "__len__") and not isinstance(loader, tuple) else None
    try:
        from rich.progress import track
    except ImportError:
        for count, pair in enumerate(pairs, 1):
            print(f"\rcurvature: batch {count}{'' if total is None else f' of {total}'}", end="", file=sys.stderr)
            yield pair
        print(file=sys.stderr)
        return
    yield from track(pairs, description="curvature", total=total, transient=True)
