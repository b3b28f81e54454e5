"""``products="bfloat16"``: directions by rounded products where they were measured to keep what float32 gives."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from kronfac.blocks import Inverse, KroneckerInverse
from kronfac.layers import LayerAdapter
from kronfac.linalg.rounded import LEAST, RoundedProduct, Workspace, pays_on
from kronfac.optim.directions import multiply_plainly
from kronfac.optim.rows import multiply_rows

#: Least cosine between the rounded and the plain direction of a layer; below, it takes float32 until its next inverse.
COSINE = 0.99
#: What a layer's name is followed by where rows stand for its gradient.
_BY_ROWS = ", by rows"

_Moved = TypeVar("_Moved", tuple[Tensor, Tensor | None], tuple[Tensor, Tensor])


class RoundedDirections:
    """Rounded copies of inverses, and how true the directions are that they give.

    The first direction after each new inverse of a layer is computed both ways, and the plain one is taken.

    Attributes:
        cosines: Cosine of the two, by layer, or by ``"<layer>, by rows"`` where rows stood for its gradient.
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
            cosines: As they were.
        """
        self.cosines, self._kept = dict(cosines), {}
        for key, cosine in cosines.items():
            inverse = inverses.get(key.removesuffix(_BY_ROWS))
            if isinstance(inverse, KroneckerInverse):
                self._keep(key, inverse, RoundedProduct(inverse.output, inverse.input), cosine)

    def multiply(
        self, name: str, inverse: KroneckerInverse, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Multiply one layer's gradients by its inverse; a `kronfac.optim.directions.Multiply`.

        Args:
            name: The layer.
            inverse: Its inverse.
            weight: Shape ``[d_out, d_in]``, or one column less with a bias.
            bias: Shape ``[d_out]``, or None.

        Returns:
            The two parts of the product; the plain ones where nothing is rounded, or was not measured yet.
        """
        if weight.dtype != torch.float32:
            return multiply_plainly(name, inverse, weight, bias)
        return self._either(
            name,
            inverse,
            lambda: multiply_plainly(name, inverse, weight, bias),
            lambda product: product(inverse.output, inverse.input, weight, bias, self._work),
        )

    def by_rows(
        self, name: str, inverse: KroneckerInverse, cotangents: Tensor, inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Multiply the gradient that rows make by a layer's inverse; a `kronfac.optim.rows.ByRows`.

        Args:
            name: The layer.
            inverse: Its inverse.
            cotangents: Shape ``[R, d_out]``.
            inputs: Shape ``[R, d_in]`` without ones.

        Returns:
            The weight's and the bias's part of the product.
        """
        return self._either(
            name + _BY_ROWS,
            inverse,
            lambda: multiply_rows(name, inverse, cotangents, inputs),
            lambda product: product.by_rows(inverse.output, inverse.input, cotangents, inputs, self._work),
        )

    def _either(
        self,
        key: str,
        inverse: KroneckerInverse,
        plain: Callable[[], _Moved],
        rounded: Callable[[RoundedProduct], _Moved],
    ) -> _Moved:
        if min(inverse.shape) < LEAST or inverse.input.dtype != torch.float32:
            return plain()
        kept, product = self._kept.get(key, (None, None))
        if kept is not None and kept() is inverse:
            return plain() if product is None else rounded(product)
        exact, product = plain(), RoundedProduct(inverse.output, inverse.input)
        cosine = _cosine(rounded(product), exact)
        if math.isfinite(cosine):  # else a gradient of zeros, or one that the optimiser is about to refuse
            self._keep(key, inverse, product, cosine)
        return exact

    def cosine(self, layer: str) -> float | None:
        """The least of a layer's cosines, or None if none was measured."""
        return min((self.cosines[key] for key in (layer, layer + _BY_ROWS) if key in self.cosines), default=None)

    def _keep(self, key: str, inverse: KroneckerInverse, product: RoundedProduct, cosine: float) -> None:
        self.cosines[key] = cosine
        self._kept[key] = weakref.ref(inverse), product if cosine >= COSINE else None


def fits(layer: LayerAdapter) -> bool:
    """Whether a layer is one matrix of two wide sides.

    Args:
        layer: The adapter.

    Returns:
        True if rounding pays.
    """
    return not layer.stack and layer.has_weight and min(layer.shape) >= LEAST


def check_reduced(layers: Mapping[str, LayerAdapter]) -> None:
    """Refuse a model without a layer that fits, and warn where rounding costs more than it saves.

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
    if not all(pays_on(parameter.device) for layer in layers.values() for parameter in layer.parameters.values()):
        warnings.warn(
            "products='bfloat16': this processor has no instructions for them, and emulates them at a fiftieth of "
            "float32's speed. Leave products out.",
            stacklevel=4,
        )


def _cosine(left: tuple[Tensor, Tensor | None], right: tuple[Tensor, Tensor | None]) -> float:
    """Cosine between two sets of tensors, in float64."""
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    sums = [[(x * y).sum(dtype=torch.float64) for x, y in ((a, b), (a, a), (b, b))] for a, b in pairs]
    inner, first, second = torch.stack([torch.stack(row) for row in sums]).sum(0).tolist()
    return inner / math.sqrt(first * second) if first * second > 0 else math.nan
