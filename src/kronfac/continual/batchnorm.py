"""Batch-norm merging: a network in eval mode as one without batch norm, for penalties and for new statistics.

A layer ``W x + b`` with batch norm after it computes ``W̃ x + b̃`` in eval mode, with

    W̃ = diag(s) W,    b̃ = β + s (b - μ),    s = γ / √(v + ε)

(μ, v: running mean and variance). Penalties act on these, since they alone decide the function (Lee et al. 2020; the
text at hand has the idea, the formulas are worked out here).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kronfac.continual.pairs import find_pairs


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

    def scale(self) -> Tensor:
        """Give ``s = γ / √(v + ε)``, differentiable in γ, shape ``[d_out]``."""
        root = torch.rsqrt(_statistic(self.norm.running_var) + self.norm.eps)
        return root if self.norm.weight is None else self.norm.weight * root

    def merged(self) -> tuple[Tensor, Tensor]:
        """Give ``W̃`` in the weight's shape and ``b̃``, differentiable in W, b, γ and β."""
        scale, weight = self.scale(), _weight(self.layer)
        shift = -_statistic(self.norm.running_mean)
        if isinstance(self.layer.bias, Tensor):
            shift = self.layer.bias + shift
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
        old_mean, old_variance = _statistic(norm.running_mean), _statistic(norm.running_var)
        mean, variance = mean.to(old_mean), variance.to(old_variance)
        norm.bias.add_(self.scale() * (mean - old_mean))
        norm.weight.mul_(((variance + norm.eps) / (old_variance + norm.eps)).sqrt())
        old_mean.copy_(mean)
        old_variance.copy_(variance)


class MergedBatchNorm:
    """A model's weights with its batch norms merged into them; made by `merge_batchnorm`.

    It refers to the live model and keeps nothing but names, so that it follows training. Names are those of the model:
    ``conv.weight`` stands for ``W̃`` and ``conv.bias`` for ``b̃`` (whether or not the convolution has a bias of its
    own); γ and β have no entry.

    Attributes:
        model: The live model.
        pairs: Layers with their batch norms, by the layer's name.
    """

    def __init__(self, model: nn.Module, pairs: Mapping[str, Pair]) -> None:
        self.model = model
        self.pairs = dict(pairs)

    def parameters(self) -> dict[str, Tensor]:
        """Merged parameters, differentiable in the live ones: what a penalty over `folded` is called on.

        Running statistics enter as constants.

        Returns:
            ``{parameter name: tensor}``, the names, shapes and order of ``folded().named_parameters()``.
        """
        live = dict(self.model.named_parameters())
        found: dict[str, Tensor] = {}
        for name, module in self.model.named_modules():
            if name in self.pairs:
                weight, bias = self.pairs[name].merged()
                found |= {f"{name}.weight": weight, f"{name}.bias": bias}
            elif module not in [pair.norm for pair in self.pairs.values()]:
                prefix = f"{name}." if name else ""
                own = (prefix + key for key, _ in module.named_parameters(recurse=False))
                found |= {key: live[key] for key in own if key in live}
        return found

    def folded(self) -> nn.Module:
        """Copy of the model as it is in eval mode, without batch norm: to estimate curvature on.

        Returns:
            A model in eval mode, with merged weights as parameters and identities in the places of batch norms.
        """
        model = copy.deepcopy(self.model).eval()
        for pair in self.pairs.values():
            weight, bias = pair.merged()
            layer = model.get_submodule(pair.layer_name)
            layer.weight = nn.Parameter(weight.detach().clone())
            layer.bias = nn.Parameter(bias.detach().clone())
            parent, _, own = pair.norm_name.rpartition(".")
            setattr(model.get_submodule(parent), own, nn.Identity())
        return model

    def statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Running statistics of this moment.

        Returns:
            ``{batch norm's name: (mean, variance)}``, copies.
        """
        return {
            pair.norm_name: (_statistic(pair.norm.running_mean).clone(), _statistic(pair.norm.running_var).clone())
            for pair in self.pairs.values()
        }

    def reparameterise(self, statistics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Give the live model new running statistics without changing its function in eval mode.

        γ and β take the change up: ``γ' = γ √(v' + ε) / √(v + ε)``, ``β' = β + s (μ' - μ)``.

        Args:
            statistics: ``{batch norm's name: (mean, variance)}``, for some or all of them.

        Raises:
            ValueError: If a name is unknown, a shape does not fit, a variance is negative, or a batch norm has no γ
                and β. Nothing is changed then.
        """
        pairs = {pair.norm_name: pair for pair in self.pairs.values()}
        for name, (mean, variance) in statistics.items():
            if name not in pairs:
                raise ValueError(f"there is no merged batch norm {name!r}; there are {sorted(pairs)}")
            if pairs[name].norm.weight is None or pairs[name].norm.bias is None:
                raise ValueError(f"batch norm {name!r} has affine=False: nothing can take the change up")
            shape = _statistic(pairs[name].norm.running_mean).shape
            if mean.shape != shape or variance.shape != shape:
                raise ValueError(f"the statistics of {name!r} must have shape {tuple(shape)}")
            if not bool((torch.isfinite(mean) & torch.isfinite(variance) & (variance >= 0)).all()):
                raise ValueError(f"the statistics of {name!r} must be finite, and the variance not negative")
        for name, (mean, variance) in statistics.items():
            pairs[name].reparameterise(mean, variance)

    def restandardise(self, inputs: Iterable[Any]) -> None:
        """Set the running statistics to means over new data, without changing the model's function in eval mode.

        So that a new task begins with the old function under its own statistics. Each batch is passed through the
        model in train mode; means and (unbiased) variances are averaged over batches.

        Args:
            inputs: Batches of inputs.

        Raises:
            ValueError: If there is none.
        """
        before = self.statistics()
        norms = [pair.norm for pair in self.pairs.values()]
        kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
        modes = {module: module.training for module in self.model.modules()}
        count = 0
        try:
            self.model.train()
            for norm in norms:
                norm.momentum = None  # cumulative averages
                norm.num_batches_tracked = torch.zeros_like(_statistic(norm.num_batches_tracked))
            with torch.no_grad():
                for batch in inputs:
                    self.model(batch)
                    count += 1
            after = self.statistics()
        finally:
            for norm, (momentum, tracked) in zip(norms, kept, strict=True):
                norm.momentum, norm.num_batches_tracked = momentum, tracked
            for module, mode in modes.items():
                module.training = mode
            for pair in self.pairs.values():
                for old, new in zip(before[pair.norm_name], _both(pair.norm), strict=True):
                    new.copy_(old)
        if not count:
            raise ValueError("inputs is empty: no batch to take statistics from")
        self.reparameterise(after)

    def check(self, inputs: Any, tolerance: float = 1e-5) -> None:
        """Compare the live model in eval mode with the merged one.

        Args:
            inputs: A batch.
            tolerance: Largest difference, relative to the largest output.

        Raises:
            ValueError: If they differ: a pairing is wrong, or a batch norm does not act on its layer's outputs.
        """
        modes = {module: module.training for module in self.model.modules()}
        try:
            with torch.no_grad():
                expected, found = self.model.eval()(inputs), self.folded()(inputs)
        finally:
            for module, mode in modes.items():
                module.training = mode
        difference = float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-30))
        if not difference <= tolerance:
            raise ValueError(f"the merged model differs from the model in eval mode by {difference:.3g}")


def merge_batchnorm(model: nn.Module, pairs: Mapping[str, str] | None = None) -> MergedBatchNorm:
    """Merge each batch norm of a model into the linear or convolution layer before it.

    Pairs are found in the model's graph (`torch.fx`), or in the order of `torch.nn.Sequential` where it cannot be
    traced. Linear layers are taken to have inputs ``[N, d_in]``; `MergedBatchNorm.check` compares outputs on a batch.

    Args:
        model: The model.
        pairs: ``{layer's name: batch norm's name}``, for all batch norms, instead of searching.

    Returns:
        The merged view; the model is not changed.

    Raises:
        TypeError: If the model is no module.
        ValueError: If a batch norm cannot be paired, has no running statistics, or does not fit its layer; the message
            names it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    modules = dict(model.named_modules())
    norms = [name for name, module in modules.items() if isinstance(module, _BatchNorm)]
    if not norms:
        raise ValueError("the model has no batch norm to merge")
    found = find_pairs(model, norms) if pairs is None else dict(pairs)
    if unknown := [name for pair in found.items() for name in pair if name not in modules]:
        raise ValueError(f"pairs names {unknown}, which the model does not have")
    if alone := [name for name in norms if name not in found.values()]:
        raise ValueError(
            f"no linear or convolution layer found right before the batch norms {alone}, whose outputs go there alone: "
            "name it with pairs={layer: batch norm}"
        )
    if len(set(found.values())) < len(found):
        raise ValueError(f"pairs gives a batch norm to two layers: {found}")
    result = {layer: Pair(layer, norm, modules[layer], modules[norm]) for layer, norm in found.items()}
    for pair in result.values():
        _check_pair(pair)
    return MergedBatchNorm(model, result)


#: Batch norms that act on the outputs of each kind of layer.
_FITTING: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (nn.Linear, nn.BatchNorm1d),
    (nn.Conv1d, nn.BatchNorm1d),
    (nn.Conv2d, nn.BatchNorm2d),
    (nn.Conv3d, nn.BatchNorm3d),
)


def _check_pair(pair: Pair) -> None:
    where = f"{pair.layer_name!r} and {pair.norm_name!r}"
    if not any(isinstance(pair.layer, a) and isinstance(pair.norm, b | nn.SyncBatchNorm) for a, b in _FITTING):
        raise ValueError(
            f"{where} cannot be merged: {type(pair.layer).__name__} and {type(pair.norm).__name__}; Linear or Conv1d "
            "with BatchNorm1d, Conv2d with BatchNorm2d, and Conv3d with BatchNorm3d can"
        )
    if pair.norm.running_mean is None or pair.norm.running_var is None:
        raise ValueError(
            f"batch norm {pair.norm_name!r} keeps no running statistics: its function in eval mode is none"
        )
    if (width := _weight(pair.layer).shape[0]) != pair.norm.num_features:
        raise ValueError(f"{where} do not fit: {width} outputs and {pair.norm.num_features} features")


def _weight(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight


def _statistic(buffer: Tensor | None) -> Tensor:
    if buffer is None:  # excluded by _check_pair, unless somebody removed it since
        raise ValueError("a batch norm has lost its running statistics")
    return buffer


def _both(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    return _statistic(norm.running_mean), _statistic(norm.running_var)
