"""Layer adapters: one file per family; ``adapt(module, name)`` finds the right one by type."""

from __future__ import annotations

from kronfac.layers import (  # noqa: F401  (registers their adapters)
    conv,
    conv_transpose,
    elsewhere,
    embedding,
    linear,
    norm,
)
from kronfac.layers.base import LayerAdapter, UnsupportedLayer
from kronfac.layers.left_out import without_curvature
from kronfac.layers.model import Adaptation, adapt_model
from kronfac.layers.registry import adapt
from kronfac.layers.repeated import called_repeatedly

__all__ = [
    "Adaptation",
    "LayerAdapter",
    "UnsupportedLayer",
    "adapt",
    "adapt_model",
    "called_repeatedly",
    "without_curvature",
]
