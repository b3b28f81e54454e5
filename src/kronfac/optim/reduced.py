"""``products="bfloat16"``: directions by rounded products where they were measured to keep what float32 gives."""

from __future__ import annotations

import math
from collections.abc import Mapping

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
        self._kept: dict[str, tuple[KroneckerInverse, RoundedProduct | None]] = {}
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

    def ready(self, name: str, inverse: Inverse) -> bool:
        """Whether a layer's direction is to be had by :meth:`apply`.

        Args:
            name: The layer.
            inverse: Its inverse.

        Returns:
            True once its present inverse was measured and found to keep the direction.
        """
        kept = self._kept.get(name)
        return kept is not None and kept[0] is inverse and kept[1] is not None

    def apply(self, name: str, layer: LayerAdapter, gradients: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Multiply one layer's gradients.

        Args:
            name: The layer, which is ready.
            layer: Its adapter.
            gradients: By parameter name.

        Returns:
            Directions by parameter name; None for gradients that cannot be viewed as a matrix in float32.
        """
        product = self._kept[name][1]
        return None if product is None else self._multiply(product, layer, gradients)

    def measure(
        self,
        name: str,
        layer: LayerAdapter,
        inverse: Inverse,
        gradients: Mapping[str, Tensor],
        plain: Mapping[str, Tensor],
    ) -> None:
        """Compare the two directions of a layer, unless that was done with this inverse.

        Args:
            name: The layer.
            layer: Its adapter.
            inverse: Its inverse.
            gradients: By parameter name.
            plain: Directions in float32.
        """
        kept = self._kept.get(name)
        if not fits(layer) or not isinstance(inverse, KroneckerInverse) or (kept is not None and kept[0] is inverse):
            return
        product = RoundedProduct(inverse.output, inverse.input)
        found = self._multiply(product, layer, gradients)
        if found is None:
            return
        cosine = _cosine(found, plain)
        if math.isfinite(cosine):  # else a gradient of zeros, or one that the optimiser is about to refuse
            self._keep(name, inverse, product, cosine)

    def _keep(self, name: str, inverse: KroneckerInverse, product: RoundedProduct, cosine: float) -> None:
        self.cosines[name] = cosine
        self._kept[name] = inverse, product if cosine >= COSINE else None

    def _multiply(
        self, product: RoundedProduct, layer: LayerAdapter, gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        weight = gradients[layer.weight_key]
        matrix = layer.matrix_view(weight)
        if matrix is None or matrix.dtype != torch.float32:
            return None
        bias = gradients[layer.bias_key] if layer.has_bias else None
        moved, column = product(matrix, bias, self._work)
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
