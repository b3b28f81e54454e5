"""From gradients to directions: ``G⁻¹ ∇ A⁻¹`` without packing or copying gradients."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from kronfac.blocks import Inverse, KroneckerInverse
from kronfac.layers import LayerAdapter
from kronfac.linalg.symmetric import row_step
from kronfac.optim.reduced import RoundedDirections


def directions(
    layers: Mapping[str, LayerAdapter],
    inverses: Mapping[str, Inverse],
    gradients: Mapping[str, Tensor],
    rounded: RoundedDirections | None = None,
) -> dict[str, Tensor]:
    """Multiply the gradients of all layers by their inverses.

    Args:
        layers: Adapters by layer.
        inverses: Inverses by layer.
        gradients: Gradients by parameter name.
        rounded: Multiplies in reduced precision where that was measured to keep the direction.

    Returns:
        New tensors by parameter name; parameters without curvature keep the plain gradient.

    Raises:
        RuntimeError: A layer has a gradient but no inverse.
    """
    out = dict(gradients)
    for name, adapter in layers.items():
        if not any(key in gradients for key in adapter.parameter_names):
            continue
        if name not in inverses:
            raise RuntimeError(
                f"Layer {name!r} has a gradient but no inverse: no forward that gathered statistics called it. "
                "Freeze it, or call it in every forward."
            )
        given = {
            key: gradients[key] if key in gradients else torch.zeros_like(parameter)
            for key, parameter in adapter.parameters.items()
        }
        plain = partial(direction, adapter, inverses[name], given)
        moved = plain() if rounded is None else rounded.multiply(name, adapter, inverses[name], given, plain)
        out |= {key: moved[key] for key in moved if key in gradients}
    return out


def direction(layer: LayerAdapter, inverse: Inverse, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiply one layer's gradients by its inverse block.

    Args:
        layer: The adapter.
        inverse: Its inverse.
        gradients: Gradients by parameter name.

    Returns:
        New tensors by parameter name, in the gradients' dtype.
    """
    if isinstance(inverse, KroneckerInverse) and not layer.stack and layer.has_weight:
        weight = gradients[layer.weight_key]
        matrix = layer.matrix_view(weight)
        if matrix is not None and matrix.dtype == inverse.input.dtype:
            return _factored(layer, inverse, matrix, gradients)
    dtype = next(iter(inverse.tensors().values())).dtype
    packed = layer.pack({name: gradient.to(dtype) for name, gradient in gradients.items()})
    solved = layer.unpack(inverse.apply(packed.contiguous()))
    return {name: solved[name].to(gradient.dtype) for name, gradient in gradients.items()}


def _factored(
    layer: LayerAdapter, inverse: KroneckerInverse, matrix: Tensor, gradients: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    weight = gradients[layer.weight_key]
    if not layer.has_bias:
        return {layer.weight_key: (inverse.output @ matrix @ inverse.input).view_as(weight)}
    # [W b] is never put together: the left product is written into one temporary, the right one read by columns.
    columns = matrix.shape[1]
    left = matrix.new_empty(matrix.shape[0], row_step(columns + 1, matrix.dtype))[:, : columns + 1]
    torch.mm(inverse.output, matrix, out=left[:, :columns])
    left[:, columns] = inverse.output @ gradients[layer.bias_key]
    solved = left @ inverse.input[:, :columns]
    return {
        layer.weight_key: solved.view(weight.shape),
        layer.bias_key: left @ inverse.input[:, columns],
    }
