"""Aliases used by every floor."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

#: Parameters, gradients or any vector over them, by full parameter name.
NamedTensors = Mapping[str, Tensor]
