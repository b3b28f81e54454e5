"""``adapt``: from a module to its adapter, by type; subclasses inherit."""

from __future__ import annotations

from functools import singledispatch

from torch import nn

from kronfac.layers.base import LayerAdapter, UnsupportedLayer


@singledispatch
def adapt(module: nn.Module, name: str, sharing: str = "expand") -> LayerAdapter:
    """Return the adapter of one layer; register a new layer type with ``@adapt.register``.

    Args:
        module: The layer.
        name: Its name within the model.
        sharing: ``"expand"`` or ``"reduce"``.

    Raises:
        UnsupportedLayer: There is no exact adapter for this module; the text says why.
    """
    raise UnsupportedLayer(f"no adapter for layers of type {type(module).__name__}")
