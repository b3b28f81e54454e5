"""Layers that one forward pass calls several times: declared, since their calls are taken for positions."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from kronfac.layers.base import REPEATS, UnsupportedLayer
from kronfac.layers.registry import adapt

_Module = TypeVar("_Module", bound=nn.Module)


def called_repeatedly(module: _Module) -> _Module:
    """Declare that a forward pass may call a module, and the layers within it, several times.

    A recurrent cell, the trunk of a siamese network, a block that is iterated. Calls of linear layers, embeddings,
    layer and RMS norms share the weight as the positions of a sequence do, and are treated as those, in their order:
    with ``sharing="expand"`` each call has rows of its own, with ``"reduce"`` inputs are averaged and cotangents summed
    over them (Eschenhagen et al. 2023), and per-example gradients (EKFAC, diagonal and dense blocks) are summed. They
    must have the same examples, along the first dimension. Calls of convolutions are further examples, and refused
    where examples must be kept apart. Layers whose calls cannot be put together (batch, group and instance norm) have
    no curvature then, and are named.

    Args:
        module: A layer, or a module of layers.

    Returns:
        The same module, marked; copies and pickles of it are marked, too.

    Raises:
        TypeError: It is no module, or there is no layer in it whose calls can be put together.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"called_repeatedly takes a torch.nn.Module, not {type(module).__name__}.")
    layers = [part for part in module.modules() if part._parameters]
    if not any(_joins(layer) for layer in layers):
        raise TypeError(
            f"called_repeatedly: {type(module).__name__} has no layer whose calls can be put together: linear layers, "
            "embeddings, convolutions, layer and RMS norms."
        )
    for layer in layers:
        setattr(layer, REPEATS, True)
    return module


def _joins(layer: nn.Module) -> bool:
    try:
        return adapt(layer, "").join is not None
    except UnsupportedLayer:
        return False
