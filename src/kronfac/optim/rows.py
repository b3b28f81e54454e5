"""``gradients="rows"``: wide linear layers keep the rows that their gradient is made of, and never form it.

A batch of ``R`` rows has the gradient ``∇ = gᵀ ā`` with inputs ``ā`` of ``R × d_in`` and cotangents ``g`` of
``R × d_out``.  Autograd forms it by a product, and preconditioning takes two more with it.  With fewer rows than the
layer is wide it is cheaper to solve first and multiply once:

    G⁻¹ ∇ A⁻¹  =  (g G⁻¹)ᵀ (ā A⁻¹)             R d_out² + R d_in² + R d_in d_out   multiplications and additions

instead of ``R d_in d_out + d_out² d_in + d_out d_in²``.  The weight takes no part in autograd's graph during the
layer's forward; its ``.grad`` stays None.  The bias's gradient is formed as ever, and is the sum of the cotangents:
whatever was done to the gradients between backward and step shows there, and is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kronfac.blocks import Inverse, KroneckerInverse
from kronfac.graph import output_edge
from kronfac.layers import LayerAdapter
from kronfac.linalg.products import matmul
from kronfac.measuring import is_apart_from_training
from kronfac.optim.gathering import Gatherer
from kronfac.optim.hooks import WeakHook, remove

#: Multiplies what rows make by an inverse: layer's name, inverse, cotangents, inputs without ones; weight's and bias's
#: part.
ByRows = Callable[[str, KroneckerInverse, Tensor, Tensor], tuple[Tensor, Tensor]]

#: Least side of a layer whose rows are kept.
LEAST = 64
#: How far the bias's gradient may be from the sum of the cotangents, relatively: rounding, of 16 bits under autocast.
TOLERANCE, TOLERANCE_16 = 1e-3, 1e-2


@dataclass
class Rows:
    """What one forward and backward gave a layer.

    Attributes:
        inputs: ``[R, d_in]`` without ones.
        cotangents: ``[R, d_out]``.
        version: The inputs' version when the layer took them.
    """

    inputs: Tensor
    cotangents: Tensor
    version: int

    def check(self, layer: str) -> None:
        """Refuse inputs that were changed in place.

        Args:
            layer: The layer's name.

        Raises:
            RuntimeError: They were.
        """
        if self.inputs._version != self.version:
            raise RuntimeError(
                f"The input of layer {layer!r} was changed in place before the step that is made of it with "
                "gradients='rows': leave it alone until after optimizer.step()."
            )


def pay(layer: LayerAdapter, rows: int) -> bool:
    """Whether solving with rows is cheaper than with the gradient that they make.

    Args:
        layer: The adapter of a linear layer.
        rows: How many there are.

    Returns:
        True if so, by nine tenths of the multiplications.
    """
    height, width = layer.shape
    return rows * (height**2 + width**2 + height * width) < 0.9 * height * width * (height + width + rows)


class RowGradients:
    """Keeps rows in place of the gradients of a model's wide linear layers.

    Args:
        layers: Adapters by layer.
        gatherer: Knows which forwards are of training, and which backwards are of statistics alone.
    """

    def __init__(self, layers: Mapping[str, LayerAdapter], gatherer: Gatherer) -> None:
        self.layers = {name: layer for name, layer in layers.items() if fits(layer)}
        self._layer_of = {layer.weight_key: name for name, layer in self.layers.items()}
        self._gatherer = gatherer
        self._kept: dict[str, list[Rows]] = {}
        self._frozen: set[str] = set()
        self._apart = False  # whether the last forward but those repeated was of a measurement
        handles: list[RemovableHandle] = []
        for name, layer in self.layers.items():
            handles += [
                layer.module.register_forward_pre_hook(WeakHook(self, "_before", layer.module, name)),
                layer.module.register_forward_hook(WeakHook(self, "_after", layer.module, name), always_call=True),
            ]
        weakref.finalize(self, remove, handles)

    def hold(self, parameter: str) -> bool:
        """Whether a parameter's gradient is kept as rows now.

        Args:
            parameter: Its name.

        Returns:
            True if so.
        """
        return self._layer_of.get(parameter) in self._kept

    def clear(self) -> None:
        """Forget all rows, as gradients are set to None."""
        self._kept = {}

    def _before(self, name: str, args: tuple[Any, ...]) -> None:
        layer, x = self.layers[name], args[0] if len(args) == 1 else None
        if not self._trains() or not isinstance(x, Tensor) or not pay(layer, x[..., 0].numel()):
            return
        weight = layer.parameters[layer.weight_key]
        if weight.requires_grad and layer.parameters[layer.bias_key].requires_grad:
            weight.requires_grad_(False)
            self._frozen.add(name)

    def _trains(self) -> bool:
        """Whether a forward now is one of training, or what a checkpoint repeats of one."""
        # While cotangents are pulled for statistics, a checkpoint repeats a part of the forward that they are of, which
        # may have been one of its own. Weights must take part in the graph now if, and only if, they did then.
        if not self._gatherer.measuring:
            self._apart = is_apart_from_training()
        return self._gatherer.wanted and not self._apart

    def _after(self, name: str, args: tuple[Any, ...], output: Any) -> None:
        if name not in self._frozen:
            return
        self._frozen.discard(name)
        weight = self.layers[name].parameters[self.layers[name].weight_key]
        weight.requires_grad_(True)
        if not isinstance(output, Tensor) or not output.requires_grad:
            return  # the forward raised, or was run without gradients
        x = args[0].detach()
        version, kept = x._version, weakref.ref(self)
        edge, _ = output_edge(output)

        def take(gradients: tuple[Tensor | None, ...]) -> None:
            rows, gradient = kept(), gradients[edge.output_nr]
            if rows is None or gradient is None or rows._gatherer.measuring:
                return
            inputs = x.flatten(0, -2)
            found = Rows(inputs, gradient.detach().reshape(len(inputs), -1), version)
            found.check(name)
            rows._kept.setdefault(name, []).append(found)

        edge.node.register_prehook(take)

    def directions(
        self, inverses: Mapping[str, Inverse], gradients: Mapping[str, Tensor], multiply: ByRows
    ) -> tuple[dict[str, Tensor], set[str]]:
        """Multiply what is kept by the layers' inverses.

        Args:
            inverses: By layer.
            gradients: The other gradients, those of the biases among them, by parameter name.
            multiply: Multiplies what a layer's rows make by its inverse.

        Returns:
            Directions by parameter name, and the layers that they are of.

        Raises:
            RuntimeError: A gradient is not that of the rows, or a layer has no inverse of Kronecker factors.
        """
        self._check(gradients)
        out: dict[str, Tensor] = {}
        for name, kept in self._kept.items():
            layer, inverse = self.layers[name], inverses.get(name)
            if not isinstance(inverse, KroneckerInverse):
                raise RuntimeError(f"Layer {name!r} has no inverse of Kronecker factors: leave gradients='rows' out.")
            dtype = inverse.input.dtype
            cotangents = _joined([rows.cotangents for rows in kept]).to(dtype)
            inputs = _joined([rows.inputs for rows in kept]).to(dtype)
            weight, bias = multiply(name, inverse, cotangents, inputs)
            moved = {layer.weight_key: weight, layer.bias_key: bias}
            out |= {key: value.to(layer.parameters[key].dtype) for key, value in moved.items()}
        return out, set(self._kept)

    def _check(self, gradients: Mapping[str, Tensor]) -> None:
        """Refuse gradients that are not those that the rows make, with one read for all layers."""
        for name, layer in self.layers.items():
            trained = layer.parameters[layer.weight_key].requires_grad
            if name not in self._kept and trained and layer.bias_key in gradients and layer.weight_key not in gradients:
                raise RuntimeError(_changed(name))
        if not self._kept:
            return
        apart, size = [], []
        for name, kept in self._kept.items():
            layer = self.layers[name]
            for rows in kept:
                rows.check(name)
            bias = layer.parameters[layer.bias_key]
            if layer.bias_key not in gradients and bias.grad is not None:
                raise RuntimeError(
                    f"The gradient of layer {name!r} is kept as rows, which no other optimizer sees, but it is in no "
                    "parameter group of this one: put weight and bias into its groups, freeze both, or leave "
                    "gradients='rows' out."
                )
            if layer.weight_key in gradients or layer.bias_key not in gradients:
                raise RuntimeError(_changed(name))
            wanted = gradients[layer.bias_key]
            found = torch.stack([rows.cotangents.sum(0, dtype=wanted.dtype) for rows in kept]).sum(0)
            apart.append(torch.linalg.vector_norm(found - wanted))
            size.append(torch.linalg.vector_norm(wanted))
        for name, difference, norm in zip(self._kept, *torch.stack([*apart, *size]).view(2, -1).tolist(), strict=True):
            bound = TOLERANCE_16 if self._kept[name][0].cotangents.itemsize == 2 else TOLERANCE
            if difference > bound * norm:  # what is not finite passes, and is refused by its own name
                raise RuntimeError(_changed(name))


def multiply_rows(name: str, inverse: KroneckerInverse, cotangents: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply the gradient that rows make by both inverses in their own precision; it is never formed.

    Args:
        name: The layer, which makes no difference.
        inverse: Its inverse.
        cotangents: Shape ``[R, d_out]``.
        inputs: Shape ``[R, d_in]`` without ones.

    Returns:
        The weight's and the bias's part of the product.
    """
    columns = inputs.shape[1]
    left = matmul(cotangents, inverse.output)
    right = matmul(inputs, inverse.input[:columns]).add_(inverse.input[columns])
    return matmul(left.mT, right[:, :columns]), left.mT @ right[:, columns]


def fits(layer: LayerAdapter) -> bool:
    """Whether a layer's rows can be kept.

    Args:
        layer: The adapter.

    Returns:
        True for wide linear layers with a bias, whose gradient in turn shows what is done to gradients.
    """
    linear = type(layer.module) is nn.Linear
    return linear and layer.has_weight and layer.has_bias and layer.sharing == "expand" and min(layer.shape) >= LEAST


def _joined(parts: list[Tensor]) -> Tensor:
    """Rows of all backwards of a step; those of a single one are not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _changed(layer: str) -> str:
    return (
        f"The bias's gradient of layer {layer!r} is not that of the rows kept with gradients='rows': gradients were "
        "scaled, clipped or set to zero between backward and step by something other than optimizer.zero_grad(), or "
        "some were formed with the optimiser paused. Leave gradients='rows' out where gradients are changed."
    )
