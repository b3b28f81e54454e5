"""``products="bfloat16"`` and ``"tf32"``: directions by rounded products, where they keep what float32 gives."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kronfac.blocks import Inverse, KroneckerInverse
from kronfac.layers import LayerAdapter
from kronfac.linalg.precision import tf32_products
from kronfac.linalg.rounded import LEAST, RoundedProduct, Workspace, pays_on
from kronfac.optim.directions import multiply_parts, multiply_plainly

#: Least cosine between the rounded and the plain direction of a layer; below, it takes float32 until its next inverse.
COSINE = 0.99


#: Multiplies by ``G⁻¹`` and ``A⁻¹``, of which it may hold rounded copies: the two, a weight, a bias, and memory.
Product = Callable[[Tensor, Tensor, Tensor, Tensor | None, Workspace], tuple[Tensor, Tensor | None]]


def _in_tf32(
    output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, work: Workspace
) -> tuple[Tensor, Tensor | None]:
    with tf32_products(True):
        return multiply_parts(output, input, weight, bias)


#: By the option's value, what makes a product from ``G⁻¹`` and ``A⁻¹``.
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Product]] = {
    "bfloat16": RoundedProduct,
    "tf32": lambda output, input: _in_tf32,
}


class RoundedDirections:
    """Rounded products with inverses, and how true the directions are that they give.

    The first direction after each new inverse of a layer is computed both ways, and the plain one is taken.

    Args:
        precision: One of :data:`PRODUCTS`.

    Attributes:
        cosines: Cosine of the two, by layer.
    """

    def __init__(self, precision: str = "bfloat16") -> None:
        self.cosines: dict[str, float] = {}
        self._make = PRODUCTS[precision]
        # Old inverses must not outlive a refresh, which would hold two sets then.
        self._kept: dict[str, tuple[weakref.ref[KroneckerInverse], Product | None]] = {}
        self._work = Workspace()

    @classmethod
    def of(cls, products: str) -> RoundedDirections | None:
        """Make them for an option's value.

        Args:
            products: One of :data:`PRODUCTS`, or ``"float32"``.

        Returns:
            None where nothing is rounded.
        """
        return cls(products) if products in PRODUCTS else None

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
                self._keep(name, inverse, self._make(inverse.output, inverse.input), cosine)

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
        if min(inverse.shape) < LEAST or weight.dtype != torch.float32:
            return multiply_plainly(name, inverse, weight, bias)
        kept, product = self._kept.get(name, (None, None))
        if kept is not None and kept() is inverse:
            if product is None:
                return multiply_plainly(name, inverse, weight, bias)
            return product(inverse.output, inverse.input, weight, bias, self._work)
        exact, product = multiply_plainly(name, inverse, weight, bias), self._make(inverse.output, inverse.input)
        cosine = _cosine(product(inverse.output, inverse.input, weight, bias, self._work), exact)
        if math.isfinite(cosine):  # else a gradient of zeros, or one that the optimiser is about to refuse
            self._keep(name, inverse, product, cosine)
        return exact

    def _keep(self, name: str, inverse: KroneckerInverse, product: Product, cosine: float) -> None:
        self.cosines[name] = cosine
        self._kept[name] = weakref.ref(inverse), product if cosine >= COSINE else None


def fits(layer: LayerAdapter) -> bool:
    """Whether a layer is one matrix of two wide sides.

    Args:
        layer: The adapter.

    Returns:
        True if rounding pays.
    """
    return not layer.stack and layer.has_weight and min(layer.shape) >= LEAST


def check_reduced(precision: str, layers: Mapping[str, LayerAdapter]) -> None:
    """Refuse a model without a layer that fits, and warn where rounding costs more than it saves.

    Args:
        precision: The option's value.
        layers: Adapters by layer.

    Raises:
        ValueError: There is none, or none is where there is such a format.
    """
    if not any(fits(layer) for layer in layers.values()):
        raise ValueError(
            f"products={precision!r} is for layers with at least {LEAST} inputs and outputs, and the model has none: "
            "leave products out."
        )
    parameters = [parameter for layer in layers.values() for parameter in layer.parameters.values()]
    if precision == "bfloat16" and not all(pays_on(parameter.device) for parameter in parameters):
        warnings.warn(
            "products='bfloat16': this processor has no instructions for them, and emulates them at a fiftieth of "
            "float32's speed. Leave products out.",
            stacklevel=4,
        )
    if precision == "tf32" and not any(parameter.is_cuda for parameter in parameters):
        raise ValueError(
            "products='tf32' is for CUDA devices, and no parameter is on one: move the model there before its "
            "optimiser is made, or leave products out."
        )


def _cosine(left: tuple[Tensor, Tensor | None], right: tuple[Tensor, Tensor | None]) -> float:
    """Cosine between two sets of tensors, in float64."""
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    sums = [[(x * y).sum(dtype=torch.float64) for x, y in ((a, b), (a, a), (b, b))] for a, b in pairs]
    inner, first, second = torch.stack([torch.stack(row) for row in sums]).sum(0).tolist()
    return inner / math.sqrt(first * second) if first * second > 0 else math.nan
