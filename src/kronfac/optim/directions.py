"""From gradients to directions: ``G⁻¹ ∇ A⁻¹`` without packing or copying gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kronfac.blocks import Inverse, KroneckerInverse
from kronfac.layers import LayerAdapter
from kronfac.linalg.products import matmul, pays
from kronfac.linalg.symmetric import row_step

#: Multiplies a layer's weight, as a matrix, and its bias by its inverse: layer's name, inverse, weight, bias.
Multiply = Callable[[str, KroneckerInverse, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def multiply_plainly(
    name: str, inverse: KroneckerInverse, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Multiply by both inverses in their own precision; ``[W b]`` is never put together.

    Args:
        name: The layer, which makes no difference.
        inverse: Its inverse.
        weight: Shape ``[d_out, d_in]``, or one column less with a bias.
        bias: Shape ``[d_out]``, or None.

    Returns:
        The two parts of the product.
    """
    if bias is None:
        return matmul(matmul(inverse.output, weight), inverse.input), None
    rows, columns = weight.shape
    if pays(inverse.output, weight):
        left = matmul(inverse.output, torch.cat([weight, bias.unsqueeze(1)], 1))
    else:  # the left product is written into one temporary
        left = weight.new_empty(rows, row_step(columns + 1, weight.dtype))[:, : columns + 1]
        torch.mm(inverse.output, weight, out=left[:, :columns])
        left[:, columns] = inverse.output @ bias
    # Of the symmetric right one, columns are rows, which lie without gaps.
    return matmul(left, inverse.input[:columns].mT), left @ inverse.input[columns]


def directions(
    layers: Mapping[str, LayerAdapter],
    inverses: Mapping[str, Inverse],
    gradients: Mapping[str, Tensor],
    multiply: Multiply = multiply_plainly,
) -> dict[str, Tensor]:
    """Multiply the gradients of all layers by their inverses.

    Args:
        layers: Adapters by layer.
        inverses: Inverses by layer.
        gradients: Gradients by parameter name.
        multiply: Multiplies layers that are one matrix and have the inverses of Kronecker factors.

    Returns:
        New tensors by parameter name; parameters without curvature keep the plain gradient.

    Raises:
        RuntimeError: A layer has a gradient but no inverse.
    """
    out = dict(gradients)
    for name, adapter in layers.items():
        present = [key for key in adapter.parameter_names if key in gradients]
        if not present:
            continue
        if name not in inverses:
            if not any(gradients[key].any() for key in present):
                continue  # not called: it stands still
            raise RuntimeError(
                f"Layer {name!r} has a gradient but no inverse: no forward that gathered statistics called it. "
                "Call it in every forward, leave it out, by kronfac.layers.without_curvature(layer), or freeze it."
            )
        given = {
            key: gradients[key] if key in gradients else torch.zeros_like(adapter.parameters[key])
            for key in adapter.parameter_names
        }
        moved = direction(adapter, inverses[name], given, multiply)
        out |= moved if len(present) == len(moved) else {key: moved[key] for key in present}
    return out


def direction(
    layer: LayerAdapter, inverse: Inverse, gradients: Mapping[str, Tensor], multiply: Multiply = multiply_plainly
) -> dict[str, Tensor]:
    """Multiply one layer's gradients by its inverse block.

    Args:
        layer: The adapter.
        inverse: Its inverse.
        gradients: Gradients by parameter name.
        multiply: As for :func:`directions`.

    Returns:
        New tensors by parameter name, in the gradients' dtype.
    """
    if isinstance(inverse, KroneckerInverse) and not layer.stack and layer.has_weight:
        weight = gradients[layer.weight_key]
        matrix = layer.matrix_view(weight)
        if matrix is not None and matrix.dtype == inverse.input.dtype:
            bias = gradients[layer.bias_key] if layer.has_bias else None
            moved, column = multiply(layer.name, inverse, matrix, bias)
            out = {layer.weight_key: moved.view(weight.shape)}
            return out if column is None else out | {layer.bias_key: column}
    dtype = next(iter(inverse.tensors().values())).dtype
    packed = layer.pack({name: gradient.to(dtype) for name, gradient in gradients.items()})
    solved = layer.unpack(inverse.apply(packed.contiguous()))
    return {name: solved[name].to(gradient.dtype) for name, gradient in gradients.items()}
