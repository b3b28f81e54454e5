"""``products="bfloat16"``: directions by rounded products where they were measured to keep what float32 gives."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kronfac.blocks import Inverse, KroneckerInverse
from kronfac.layers import LayerAdapter
from kronfac.linalg.rounded import LEAST, RoundedProduct, Workspace

#: Least cosine between the rounded and the plain direction of a layer; below, it takes float32 until its next inverse.
COSINE = 0.99


class RoundedDirections:
    """Rounded copies of inverses, and how true the directions are that they give.

    The first direction after each new inverse of a layer is computed both ways, and the plain one is taken.

    Attributes:
        cosines: Cosine of the two, by layer.
    """

    def __init__(self) -> None:
        self.cosines: dict[str, float] = {}
        # Old inverses must not outlive a refresh, which would hold two sets then.
        self._kept: dict[str, tuple[weakref.ref[KroneckerInverse], RoundedProduct | None]] = {}
        self._work = Workspace()

    def restore(self, inverses: Mapping[str, Inverse], cosines: Mapping[str, float]) -> None:
        """Take the cosines of a saved run, whose inverses are not measured anew.

        Args:
            inverses: By layer.
            cosines: By layer.
        """
        self.cosines, self._kept = dict(cosines), {}
        for name, cosine in cosines.items():
            inverse = inverses.get(name)
            if isinstance(inverse, KroneckerInverse):
                self._keep(name, inverse, RoundedProduct(inverse.output, inverse.input), cosine)

    def multiply(
        self,
        name: str,
        layer: LayerAdapter,
        inverse: Inverse,
        gradients: Mapping[str, Tensor],
        plain: Callable[[], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Multiply one layer's gradients by its inverse.

        Args:
            name: The layer.
            layer: Its adapter.
            inverse: Its inverse.
            gradients: By parameter name.
            plain: Computes the direction in float32.

        Returns:
            The direction by parameter name; the plain one where nothing is rounded, or was not measured yet.
        """
        if not fits(layer) or not isinstance(inverse, KroneckerInverse):
            return plain()
        kept, product = self._kept.get(name, (None, None))
        if kept is not None and kept() is inverse:
            found = None if product is None else self._multiply(product, layer, inverse, gradients)
            return plain() if found is None else found
        exact, product = plain(), RoundedProduct(inverse.output, inverse.input)
        found = self._multiply(product, layer, inverse, gradients)
        cosine = math.nan if found is None else _cosine(found, exact)
        if math.isfinite(cosine):  # else a gradient of zeros, or one that the optimiser is about to refuse
            self._keep(name, inverse, product, cosine)
        return exact

    def _keep(self, name: str, inverse: KroneckerInverse, product: RoundedProduct, cosine: float) -> None:
        self.cosines[name] = cosine
        self._kept[name] = weakref.ref(inverse), product if cosine >= COSINE else None

    def _multiply(
        self, product: RoundedProduct, layer: LayerAdapter, inverse: KroneckerInverse, gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        weight = gradients[layer.weight_key]
        matrix = layer.matrix_view(weight)
        if matrix is None or matrix.dtype != torch.float32:
            return None
        bias = gradients[layer.bias_key] if layer.has_bias else None
        moved, column = product(inverse.output, inverse.input, matrix, bias, self._work)
        out = {layer.weight_key: moved.view(weight.shape)}
        return out if column is None else out | {layer.bias_key: column}


def fits(layer: LayerAdapter) -> bool:
    """Whether a layer is one matrix of two wide sides.

    Args:
        layer: The adapter.

    Returns:
        True if rounding pays.
    """
    return not layer.stack and layer.has_weight and min(layer.shape) >= LEAST


def check_reduced(layers: Mapping[str, LayerAdapter]) -> None:
    """Refuse a model without a layer that fits.

    Args:
        layers: Adapters by layer.

    Raises:
        ValueError: There is none.
    """
    if not any(fits(layer) for layer in layers.values()):
        raise ValueError(
            f"products='bfloat16' is for layers with at least {LEAST} inputs and outputs, and the model has none: "
            "leave products out."
        )


def _cosine(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Cosine between two sets of tensors, in float64."""
    pairs = [(left[name].flatten(), right[name].flatten()) for name in left]
    sums = [torch.stack([(a * b).sum(dtype=torch.float64), (a * a).sum(dtype=torch.float64),
                         (b * b).sum(dtype=torch.float64)]) for a, b in pairs]  # fmt: skip
    inner, first, second = torch.stack(sums).sum(0).tolist()
    return inner / math.sqrt(first * second) if first * second > 0 else math.nan
