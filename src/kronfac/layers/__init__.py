"""Layer adapters: one file per family; ``adapt(module, name)`` finds the right one by type."""

from __future__ import annotations

from kronfac.layers import conv, conv_transpose, embedding, linear, norm  # noqa: F401  (registers their adapters)
from kronfac.layers.base import LayerAdapter, UnsupportedLayer
from kronfac.layers.model import Adaptation, adapt_model
from kronfac.layers.registry import adapt
from kronfac.layers.repeated import called_repeatedly

__all__ = ["Adaptation", "LayerAdapter", "UnsupportedLayer", "adapt", "adapt_model", "called_repeatedly"]
