"""What KLD-WRM holds: the wake, which lies with the parameters, and what is saved and loaded besides K-FAC's state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kronfac.optim.wake import layer_product

if TYPE_CHECKING:
    from kronfac.optim.kldwrm import KLDWRM

_KEYS = {"variant", "dampings", "sums", "networks"}


def free_parameters(optimizer: KLDWRM) -> list[Tensor]:
    """List the parameters that are not frozen now; none of the optimiser's keeps a gradient.

    Args:
        optimizer: The optimiser.

    Returns:
        The parameters; a ``RuntimeError`` says so if there are none.
    """
    for parameter, _ in optimizer._members():
        parameter.grad = None  # with one, a frozen parameter would move
    return optimizer._free()


def still_products(optimizer: KLDWRM, moves: Mapping[str, Tensor], carried: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``F̄ s`` for parameters that stand still while others of their layer move, with which ``F̄`` couples them.

    Args:
        optimizer: The optimiser.
        moves: The steps of those that move, by name.
        carried: What is added to them, where there is something.

    Returns:
        Products by name, for those that stand still alone.
    """
    members = {optimizer._names[id(p)] for p, _ in optimizer._members()}
    products: dict[str, Tensor] = {}
    for layer in optimizer._inverses:
        adapter = optimizer._estimator.adaptation.adapters[layer]
        moved = [name for name in adapter.parameter_names if name in moves]
        still = [name for name in adapter.parameter_names if name in members and name not in moves]
        if moved and still:
            steps = {name: moves[name] + carried.get(name, 0.0) for name in moved}
            product = layer_product(adapter, optimizer._average_of(layer), steps)
            products |= {name: product[name] for name in still}
    return products


def follow(optimizer: KLDWRM, products: Mapping[str, Tensor]) -> None:
    """Move the wake on: ``u_k = ρ u_{k−1} + F̄_k s_k``, which decays where nothing moved.

    Args:
        optimizer: The optimiser.
        products: ``F̄_k s_k`` by name; zero where it is left out.
    """
    for parameter, _ in optimizer._members():
        name = optimizer._names[id(parameter)]
        if name in products:
            optimizer._buffer(parameter, "wake").mul_(optimizer._rho).add_(products[name])
        elif "wake" in optimizer.state[parameter]:
            optimizer.state[parameter]["wake"].mul_(optimizer._rho)


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
