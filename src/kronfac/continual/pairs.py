"""Which layer stands right before which batch norm, and the two as one layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kronfac.layers.registry import runs_as

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Pair:
    """A layer and the batch norm after it.

    Attributes:
        layer_name: Name of the layer within the model.
        norm_name: Name of the batch norm.
        layer: A linear or convolution layer.
        norm: Batch norm over the layer's outputs.
    """

    layer_name: str
    norm_name: str
    layer: nn.Module
    norm: _BatchNorm

    @property
    def weight(self) -> Tensor:
        """The layer's weight."""
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return weight

    def scale(self, variance: Tensor | None = None) -> Tensor:
        """Give ``s = γ / √(v + ε)``, differentiable in γ (and ``v``, if given), shape ``[d_out]``.

        Args:
            variance: ``v``; the running variance by default.

        Returns:
            The scales.
        """
        root = torch.rsqrt((statistic(self.norm.running_var) if variance is None else variance) + self.norm.eps)
        return root if self.norm.weight is None else self.norm.weight * root

    def merged(self, statistics: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Give ``W̃`` in the weight's shape and ``b̃``, differentiable in W, b, γ and β.

        Args:
            statistics: Mean and variance to use instead of the running ones, differentiable too.

        Returns:
            Weight and bias.
        """
        mean, variance = (statistic(self.norm.running_mean), None) if statistics is None else statistics
        scale, weight = self.scale(variance), self.weight
        shift = self.layer.bias - mean if isinstance(self.layer.bias, Tensor) else -mean
        bias = scale * shift
        if self.norm.bias is not None:
            bias = self.norm.bias + bias
        return scale.view(-1, *[1] * (weight.ndim - 1)) * weight, bias

    @torch.no_grad()
    def reparameterise(self, mean: Tensor, variance: Tensor) -> None:
        """Take new running statistics, and change γ and β so that ``W̃`` and ``b̃`` stay what they are.

        ``γ' = γ √(v' + ε) / √(v + ε)`` and ``β' = β + s (μ' - μ)``.

        Args:
            mean: ``μ'``, shape ``[d_out]``.
            variance: ``v'``, shape ``[d_out]``, not negative.
        """
        norm = self.norm
        old_mean, old_variance = statistic(norm.running_mean), statistic(norm.running_var)
        mean, variance = mean.to(old_mean), variance.to(old_variance)
        norm.bias.add_(self.scale() * (mean - old_mean))
        norm.weight.mul_(((variance + norm.eps) / (old_variance + norm.eps)).sqrt())
        old_mean.copy_(mean)
        old_variance.copy_(variance)


def find_pairs(model: nn.Module, norms: Sequence[str]) -> dict[str, str]:
    """Find the layers whose outputs go to a batch norm and nowhere else.

    Args:
        model: The model.
        norms: Names of its batch norms.

    Returns:
        ``{layer's name: batch norm's name}``, of those that were found.
    """
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # tracing runs the model's own code on stand-ins, and that may fail in any way
        return _in_sequences(model, norms)
    modules = dict(model.named_modules())
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    found = {}
    for norm in norms:
        uses = calls.get(norm, [])
        source = uses[0].args[0] if len(uses) == 1 and uses[0].args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        layer = str(source.target)
        if isinstance(modules.get(layer), _LAYERS) and len(calls[layer]) == 1:
            found[layer] = norm
    return found


def _in_sequences(model: nn.Module, norms: Sequence[str]) -> dict[str, str]:
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        prefix = f"{name}." if name else ""
        for (first, layer), (second, _) in pairwise(module.named_children()):
            if isinstance(layer, _LAYERS) and prefix + second in norms:
                found[prefix + first] = prefix + second
    return found


#: Batch norms that act on the outputs of each kind of layer.
_FITTING: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (nn.Linear, nn.BatchNorm1d),
    (nn.Conv1d, nn.BatchNorm1d),
    (nn.Conv2d, nn.BatchNorm2d),
    (nn.Conv3d, nn.BatchNorm3d),
)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def check_pair(pair: Pair) -> None:
    """Refuse what cannot be merged, and say why.

    Args:
        pair: A layer and a batch norm.

    Raises:
        ValueError: If they do not fit, or there are no running statistics.
    """
    where = f"{pair.layer_name!r} and {pair.norm_name!r}"
    if not any(isinstance(pair.layer, a) and isinstance(pair.norm, b | nn.SyncBatchNorm) for a, b in _FITTING):
        raise ValueError(
            f"{where} cannot be merged: {type(pair.layer).__name__} and {type(pair.norm).__name__}; Linear or Conv1d "
            "with BatchNorm1d, Conv2d with BatchNorm2d, and Conv3d with BatchNorm3d can"
        )
    if not any(runs_as(pair.norm, kind) for kind in _NORMS):
        raise ValueError(
            f"{where} cannot be merged: {type(pair.norm).__name__} {pair.norm_name!r} has a forward of its own, which "
            "merged weights would leave out: use torch's batch norm, and a module of its own for what else it does"
        )
    if not (any(runs_as(pair.layer, kind) for kind in _LAYERS) or _follows_weights(pair.layer)):
        raise ValueError(
            f"{where} cannot be merged: {type(pair.layer).__name__} {pair.layer_name!r} has a forward of its own, and "
            "its outputs are not scaled and shifted as its weight and bias are, so that merged weights would be "
            "another function"
        )
    if pair.norm.running_mean is None or pair.norm.running_var is None:
        raise ValueError(
            f"batch norm {pair.norm_name!r} keeps no running statistics: its function in eval mode is none"
        )
    if (width := pair.weight.shape[0]) != pair.norm.num_features:
        raise ValueError(f"{where} do not fit: {width} outputs and {pair.norm.num_features} features")


@torch.no_grad()
def _follows_weights(layer: nn.Module) -> bool:
    """Whether ``diag(s) W`` and ``diag(s) b + t`` give ``s y + t`` in a layer with a forward of its own, by a trial."""
    generator = torch.Generator().manual_seed(0)  # which leaves the user's random numbers alone
    try:
        twin: Any = copy.deepcopy(layer).cpu().double().eval()
        width, weight, bias = len(twin.weight), twin.weight, twin.bias
        if isinstance(twin, nn.Linear):
            shape = [3, twin.in_features]
        else:
            extents = zip(twin.kernel_size, twin.dilation, strict=True)
            shape = [3, twin.in_channels, *(2 * d * k + 1 for k, d in extents)]
        scale, shift = torch.rand(2, width, generator=generator, dtype=torch.float64) + 0.5
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        before = twin(x)
        weight.mul_(scale.view(-1, *[1] * (weight.ndim - 1)))
        twin.bias = nn.Parameter(shift if bias is None else scale * bias + shift)
        broadcast = (-1, *[1] * (before.ndim - 2))
        wanted = scale.view(broadcast) * before + shift.view(broadcast)
        return bool(torch.allclose(twin(x), wanted, rtol=1e-6, atol=1e-8))  # weights may be cast on the way
    except Exception:  # it is the user's own code
        return False


def check_plain(pair: Pair) -> None:
    """Refuse a layer whose weight or bias is no parameter of its own, where that is to be replaced.

    Args:
        pair: A layer and a batch norm.

    Raises:
        ValueError: If they are computed from other parameters.
    """
    own = dict(pair.layer.named_parameters(recurse=False))
    for name in ("weight", "bias"):
        if name not in own and getattr(pair.layer, name) is not None:
            raise ValueError(
                f"the {name} of layer {pair.layer_name!r} is computed from other parameters (weight_norm, "
                "spectral_norm, prune), which have no merged form: make it a plain one first, by "
                "torch.nn.utils.parametrize.remove_parametrizations or its like"
            )


def statistic(buffer: Tensor | None) -> Tensor:
    """Give a buffer that must be there.

    Args:
        buffer: A running statistic.

    Returns:
        The buffer.

    Raises:
        ValueError: If it is None.
    """
    if buffer is None:  # excluded by check_pair, unless somebody removed it since
        raise ValueError("a batch norm has lost its running statistics")
    return buffer
