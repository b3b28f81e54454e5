"""Saving and loading inverses, those that are on their way among them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from kronfac.blocks import INVERSES, Inverse
from kronfac.optim.background import Pending
from kronfac.optim.refresh import Refreshed

if TYPE_CHECKING:
    from kronfac.optim.kfac import KFAC


def number(what: str, value: object) -> float:
    """Refuse what is no finite number.

    Args:
        what: Its name in the state.
        value: What the state has.

    Returns:
        The number.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"The state's {what} is {value!r}, which is no number.")
    return value


def save_pending(pending: Pending | None) -> dict[str, Any] | None:
    """Wait for a refresh on its way and describe it; one that failed will fail again when it is taken over.

    Args:
        pending: The refresh, or None.

    Returns:
        Plain values.
    """
    if pending is None:
        return None
    entry: dict[str, Any] = {"started": pending.started, "due": pending.due}
    try:
        found = pending.result()
    except (torch.linalg.LinAlgError, FloatingPointError) as error:
        return {**entry, "error": str(error), "overflow": isinstance(error, FloatingPointError)}
    return {
        **entry,
        "inverses": save_inverses(found.inverses),
        "retried": list(found.retried),
        "iterations": dict(found.iterations),
        "fallbacks": list(found.fallbacks),
    }


def load_pending(optimizer: KFAC, saved: dict[str, Any] | None) -> Pending | None:
    """Rebuild a refresh that was on its way.

    Args:
        optimizer: The optimiser.
        saved: From :func:`save_pending`.

    Returns:
        A finished one, or one that failed.
    """
    if saved is None:
        return None
    started, due = (int(number(key, saved[key])) for key in ("started", "due"))
    if "error" in saved:
        kind = FloatingPointError if saved["overflow"] else torch.linalg.LinAlgError
        return Pending.failed(started, due, kind(str(saved["error"])))
    inverses = load_inverses(optimizer, saved["inverses"])
    retried, fallbacks = (tuple(str(name) for name in saved.get(key, ())) for key in ("retried", "fallbacks"))
    iterations = {str(name): int(count) for name, count in saved.get("iterations", {}).items()}
    return Pending.finished(started, due, Refreshed(inverses, retried, iterations, fallbacks))


def save_inverses(inverses: Mapping[str, Inverse]) -> dict[str, dict[str, object]]:
    """Describe inverses by plain tensors and strings.

    Args:
        inverses: Inverses by layer.

    Returns:
        What :func:`load_inverses` takes.
    """
    return {
        name: {"kind": inverse.kind, "shape": list(inverse.shape), "tensors": inverse.tensors()}
        for name, inverse in inverses.items()
    }


def load_inverses(optimizer: KFAC, saved: dict[str, Any]) -> dict[str, Inverse]:
    """Rebuild the inverses of an optimiser's layers.

    Args:
        optimizer: The optimiser.
        saved: From :func:`save_inverses`.

    Returns:
        Inverses by layer.

    Raises:
        ValueError: They are of other layers, shapes or kinds.
    """
    statistics, adapters = optimizer._estimator.statistics, optimizer._estimator.adaptation.adapters
    if unknown := sorted(set(saved) - set(statistics)):
        raise ValueError(f"The state holds inverses of layers {unknown}, which the model does not have.")
    device = next(iter(next(iter(statistics.values())).means().values())).total.device
    inverses = {name: _rebuilt(name, entry, device) for name, entry in saved.items()}
    for layer, inverse in inverses.items():
        if inverse.shape != adapters[layer].shape:
            shapes = f"{tuple(inverse.shape)}, not {tuple(adapters[layer].shape)}"
            raise ValueError(f"Layer {layer!r}: the state's inverse has shape {shapes}.")
    return inverses


def _rebuilt(layer: str, entry: Mapping[str, Any], device: torch.device) -> Inverse:
    kind = entry["kind"]
    if kind not in INVERSES:
        raise ValueError(f"The checkpoint holds an inverse of unknown kind {kind!r} for layer {layer!r}.")
    tensors = {key: tensor.to(device, copy=True) for key, tensor in entry["tensors"].items()}
    return INVERSES[kind].from_tensors(tensors, torch.Size(entry["shape"]))
