"""Directions of all normalisation layers together: each of their units has a block of one row or two.

A product for each layer would take longer to launch than to compute.  The blocks of all units lie in one tensor
``[U, n, n]`` that is kept until an inverse changes, and one elementwise product serves all layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from kronfac.blocks import DenseInverse, Inverse
from kronfac.layers import LayerAdapter

_Key = tuple[int, torch.dtype, torch.device]


class UnitDirections:
    """Multiplies the gradients of normalisation layers by the inverses of their units' blocks."""

    def __init__(self) -> None:
        # Old inverses must not outlive a refresh.
        self._kept: dict[_Key, tuple[list[weakref.ref[Inverse]], Tensor]] = {}

    def __call__(
        self, layers: Mapping[str, LayerAdapter], inverses: Mapping[str, Inverse], gradients: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], set[str]]:
        """Multiply.

        Args:
            layers: Adapters by layer; those that are no normalisation layers are left out.
            inverses: Inverses by layer.
            gradients: Gradients by parameter name.

        Returns:
            New tensors by parameter name, in the gradients' dtype, and the layers that they are of.
        """
        groups: dict[_Key, list[str]] = {}
        for name, layer in layers.items():
            inverse, whole = inverses.get(name), all(key in gradients for key in layer.parameter_names)
            if layer.unit_wise and layer.stack and isinstance(inverse, DenseInverse) and whole:
                matrix = inverse.matrix
                groups.setdefault((matrix.shape[-1], matrix.dtype, matrix.device), []).append(name)
        out: dict[str, Tensor] = {}
        for key, names in groups.items():
            out |= self._multiply(key, [layers[name] for name in names], [inverses[name] for name in names], gradients)
        return out, {name for names in groups.values() for name in names}

    def _multiply(
        self, key: _Key, layers: list[LayerAdapter], inverses: list[Inverse], gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        dtype, sizes = key[1], [layer.stack[0] for layer in layers]
        columns = [
            torch.cat([gradients[layer.parameter_names[place]].reshape(-1) for layer in layers]).to(dtype)
            for place in range(key[0])
        ]
        solved = (self._matrices(key, inverses) * torch.stack(columns, 1).unsqueeze(1)).sum(2)
        out = {}
        for place, column in enumerate(solved.unbind(1)):
            for layer, part in zip(layers, column.split(sizes), strict=True):
                gradient = gradients[layer.parameter_names[place]]
                out[layer.parameter_names[place]] = part.reshape(gradient.shape).to(gradient.dtype)
        return out

    def _matrices(self, key: _Key, inverses: list[Inverse]) -> Tensor:
        """Inverses of all units, ``[U, n, n]``."""
        known, matrices = self._kept.get(key, ([], None))
        if (
            matrices is None
            or len(known) != len(inverses)
            or any(ref() is not inverse for ref, inverse in zip(known, inverses, strict=True))
        ):
            matrices = torch.cat([inverse.tensors()["matrix"] for inverse in inverses])
            self._kept[key] = [weakref.ref(inverse) for inverse in inverses], matrices
        return matrices
