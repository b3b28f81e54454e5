"""Saving and loading what KLD-WRM holds besides K-FAC's state and the wake, which lies with the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kronfac.optim.kldwrm import KLDWRM

_KEYS = {"variant", "dampings", "sums", "networks"}


def save_wake(optimizer: KLDWRM) -> dict[str, Any]:
    """Describe dampings, what the inverses are of, and the networks before.

    Args:
        optimizer: The optimiser.

    Returns:
        What :func:`load_wake` takes.
    """
    return {
        "variant": optimizer._variant,
        "dampings": dict(optimizer._dampings),
        "sums": optimizer._sums,
        "networks": [{"kappa": kappa, "parameters": dict(kept)} for kappa, kept in optimizer._networks.kept],
    }


def load_wake(optimizer: KLDWRM, state_dict: dict[str, Any]) -> Callable[[], None]:
    """Check a saved state against an optimiser.

    Args:
        optimizer: The optimiser.
        state_dict: Its ``state_dict()``.

    Returns:
        A function that puts the state in; it cannot fail.

    Raises:
        ValueError: The state does not fit.
    """
    saved = state_dict.get("kldwrm") if isinstance(state_dict, dict) else None
    if not isinstance(saved, dict) or saved.keys() != _KEYS:
        raise ValueError("This is no state of KLDWRM: it has no wake.")
    if saved["variant"] != optimizer._variant:
        raise ValueError(f"The state is of variant={saved['variant']!r}, the optimiser of {optimizer._variant!r}.")
    try:
        dampings = {str(layer): float(value) for layer, value in saved["dampings"].items()}
        networks = [(float(entry["kappa"]), _copies(optimizer, entry["parameters"])) for entry in saved["networks"]]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"The state is damaged: {type(error).__name__}: {error}") from error
    layers = set(optimizer._estimator.statistics)
    if not all(math.isfinite(value) for value in dampings.values()) or (dampings and set(dampings) != layers):
        raise ValueError(f"The state's dampings {dampings} are not those of layers {sorted(layers)}.")

    def apply() -> None:
        optimizer._wake.drop()
        optimizer._averages, optimizer._model = {}, {}
        optimizer._dampings, optimizer._sums = dampings, bool(saved["sums"])
        optimizer._networks.kept = networks
        optimizer.inner_objectives = []

    return apply


def _copies(optimizer: KLDWRM, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    own = {optimizer._names[id(p)]: p for p, _ in optimizer._members()}
    for name, tensor in saved.items():
        if name not in own or tensor.shape != own[name].shape:
            raise ValueError(
                f"The state's network has a parameter {name!r} of shape {tuple(tensor.shape)}, unlike the model."
            )
    return {name: torch.empty_like(own[name]).copy_(tensor).detach() for name, tensor in saved.items()}
