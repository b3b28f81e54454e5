"""Layers that are left out of the curvature, and trained all the same: declared."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from kronfac.layers.base import LEFT_OUT

_Module = TypeVar("_Module", bound=nn.Module)


def without_curvature(module: _Module) -> _Module:
    """Declare that a module, and all layers within it, have no curvature: their parameters take the plain gradient.

    It is for layers that are otherwise refused when statistics are gathered, since a forward uses their weight without
    calling them, calls them several times, or mixes examples before them, and for what one does not want curvature of.
    Optimisers train such parameters as those of any layer without a block: by the same step on the plain gradient, or
    by the optimiser given as ``fallback=``. Declare before the optimiser is made.

    Args:
        module: A layer, or a module of layers.

    Returns:
        The same module, marked; copies and pickles of it are marked, too.

    Raises:
        TypeError: It is no module, or has no parameter.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"without_curvature takes a torch.nn.Module, not {type(module).__name__}.")
    parts = [part for part in module.modules() if part._parameters]
    if not parts:
        raise TypeError(f"without_curvature: {type(module).__name__} has no parameter.")
    for part in parts:
        setattr(part, LEFT_OUT, True)
    return module
