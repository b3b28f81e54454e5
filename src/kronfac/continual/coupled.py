"""Layers that are one with the batch norm after them, in train mode."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kronfac.continual.pairs import Pair
from kronfac.layers import adapt


class _Normalising(nn.Module):
    """Mixed into a layer: computes with the live model's weights and batch norm, and has merged weights to show."""

    #: Weight and bias before merging: no parameters, but differentiable, so that the outputs have a place in the graph.
    raw: tuple[Tensor, Tensor | None]
    gamma: Tensor | None
    beta: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.before(x), None, None, self.gamma, self.beta, training=True, eps=self.eps)

    def before(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class _Linear(_Normalising, nn.Linear):
    def before(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.raw)


class _Conv1d(_Normalising, nn.Conv1d):
    def before(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *self.raw)


class _Conv2d(_Normalising, nn.Conv2d):
    def before(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *self.raw)


class _Conv3d(_Normalising, nn.Conv3d):
    def before(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *self.raw)


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _Linear,
    nn.Conv1d: _Conv1d,
    nn.Conv2d: _Conv2d,
    nn.Conv3d: _Conv3d,
}
for _plain, _kind in _KINDS.items():
    adapt.register(_kind)(adapt.dispatch(_plain))  # what is gathered at them is what belongs to the merged weights


def normalising(pair: Pair, layer: nn.Module) -> nn.Module:
    """Turn a layer into one that holds its batch norm.

    The layer's outputs are those of batch norm, so that what is gathered at it is what belongs to ``W̃ x + b̃``:
    its inputs, and derivatives in what comes out of batch norm.

    Args:
        pair: The layer and its batch norm.
        layer: A copy of the layer, which is changed.

    Returns:
        The layer, with merged weights as parameters, and with the function of both.

    Raises:
        ValueError: If the layer is of a kind of its own, or batch norm is synchronised.
    """
    kind = _KINDS.get(type(layer))
    if kind is None:
        raise ValueError(
            f"layer {pair.layer_name!r} is a {type(layer).__name__}, whose forward is its own: only torch's Linear and "
            "Conv1d to Conv3d can be made one with their batch norm; use folded(), in which examples do not interact"
        )
    if isinstance(pair.norm, nn.SyncBatchNorm):
        raise ValueError(
            f"batch norm {pair.norm_name!r} is an nn.SyncBatchNorm, which couples examples of different processes in "
            "train mode: use nn.BatchNorm, or folded(), in which examples do not interact"
        )
    weight, bias = pair.merged()
    own: tuple[Tensor, Tensor | None] = (layer.weight, layer.bias)  # type: ignore[assignment]
    raw = tuple(None if p is None else p.detach().clone().requires_grad_() for p in own)
    layer.weight = nn.Parameter(weight.detach().clone())
    layer.bias = nn.Parameter(bias.detach().clone())
    layer.__class__ = kind
    layer.raw, layer.eps = raw, pair.norm.eps  # type: ignore[assignment]
    for name, parameter in (("gamma", pair.norm.weight), ("beta", pair.norm.bias)):
        layer.register_buffer(name, None if parameter is None else parameter.detach().clone(), persistent=False)
    return layer
