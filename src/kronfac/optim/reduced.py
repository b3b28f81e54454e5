"""``products="bfloat16"``: directions by rounded products where they were measured to keep what float32 gives."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass
class _Copy:
    """Rounded copies of a layer's inverse, where they are of use; the inverse must not outlive a refresh by them."""

    inverse: weakref.ref[KroneckerInverse]
    product: RoundedProduct | None = None


class RoundedDirections:
    """Rounded copies of inverses, and how true the directions are that they give.

    The first direction after each new inverse of a layer is computed both ways, and the plain one is taken.

    Attributes:
        cosines: Cosine of the two, by layer, or by ``"<layer>, by rows"`` where rows stood for its gradient.
    """

    def __init__(self) -> None:
        self.cosines: dict[str, float] = {}
        self._copies: dict[str, _Copy] = {}
        self._work = Workspace()

    def restore(self, inverses: Mapping[str, Inverse], cosines: Mapping[str, float]) -> None:
        """Take the cosines of a saved run, whose inverses are not measured anew.

        Args:
            inverses: By layer.
            cosines: As they were.
        """
        self.cosines, self._copies = {}, {}
        for key, cosine in cosines.items():
            inverse = inverses.get(key.removesuffix(_BY_ROWS))
            if isinstance(inverse, KroneckerInverse):
                copy = self._copy(key.removesuffix(_BY_ROWS), inverse)
                self._keep(key, cosine, copy, copy.product or RoundedProduct(inverse.output, inverse.input))

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
            (name, ""),
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
            (name, _BY_ROWS),
            inverse,
            lambda: multiply_rows(name, inverse, cotangents, inputs),
            lambda product: product.by_rows(inverse.output, inverse.input, cotangents, inputs, self._work),
        )

    def cosine(self, layer: str) -> float | None:
        """Say how true a layer's directions are.

        Args:
            layer: Its name.

        Returns:
            The least of its cosines; None if none was measured.
        """
        return min((self.cosines[key] for key in (layer, layer + _BY_ROWS) if key in self.cosines), default=None)

    def _either(
        self,
        way: tuple[str, str],
        inverse: KroneckerInverse,
        plain: Callable[[], _Moved],
        rounded: Callable[[RoundedProduct], _Moved],
    ) -> _Moved:
        if min(inverse.shape) < LEAST or inverse.input.dtype != torch.float32:
            return plain()
        copy, key = self._copy(way[0], inverse), "".join(way)
        if key in self.cosines:
            return rounded(copy.product) if copy.product and self.cosines[key] >= COSINE else plain()
        exact, product = plain(), copy.product or RoundedProduct(inverse.output, inverse.input)
        cosine = _cosine(rounded(product), exact)
        if math.isfinite(cosine):  # else a gradient of zeros, or one that the optimiser is about to refuse
            self._keep(key, cosine, copy, product)
        return exact

    def _copy(self, layer: str, inverse: KroneckerInverse) -> _Copy:
        """The layer's copy; an empty one, without cosines, where there is none of this inverse."""
        known = self._copies.get(layer)
        if known is None or known.inverse() is not inverse:
            known = self._copies[layer] = _Copy(weakref.ref(inverse))
            for key in (layer, layer + _BY_ROWS):
                self.cosines.pop(key, None)
        return known

    def _keep(self, key: str, cosine: float, copy: _Copy, product: RoundedProduct) -> None:
        self.cosines[key] = cosine
        if cosine >= COSINE:
            copy.product = product


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
