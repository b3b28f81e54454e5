"""Batch-norm merging: a network in eval mode as one without batch norm, for penalties and for new statistics.

A layer ``W x + b`` with batch norm after it computes ``W̃ x + b̃`` in eval mode, with

    W̃ = diag(s) W,    b̃ = β + s (b - μ),    s = γ / √(v + ε)

(μ, v: running mean and variance). Penalties act on these, since they alone decide the function (Lee et al. 2020; the
text at hand has the idea, the formulas are worked out here).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kronfac.continual.coupled import normalising
from kronfac.continual.pairs import Pair, check_pair, check_plain, find_pairs, statistic
from kronfac.continual.statistics import BatchStatistics, TrackedStatistics, check_statistics, measured
from kronfac.continual.uses import called_once, called_together, check_uses
from kronfac.eager import eager_root
from kronfac.measuring import kept_modes


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

    def parameters(self, statistics: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> dict[str, Tensor]:
        """Merged parameters, differentiable in the live ones: what a penalty over `folded` is called on.

        Args:
            statistics: ``{batch norm's name: (mean, variance)}`` to merge with, such as those that `watched` gives, in
                which the result is differentiable. Batch norms that are not named, by default all, are merged with
                their running statistics, which enter as constants.

        Returns:
            ``{parameter name: tensor}``, the names, shapes and order of ``folded().named_parameters()``.

        Raises:
            ValueError: If a name is unknown, a shape does not fit, or `watched` or `tracked` saw no batch while batch
                norm is in train mode.
        """  # noqa: DOC502
        statistics = {} if statistics is None else statistics
        check_statistics(self.pairs.values(), statistics)
        live = dict(self.model.named_parameters())
        found: dict[str, Tensor] = {}
        for name, module in self.model.named_modules():
            if name in self.pairs:
                pair = self.pairs[name]
                weight, bias = pair.merged(statistics.get(pair.norm_name))
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

        Raises:
            ValueError: If a layer's weight is computed from other parameters.
        """  # noqa: DOC502
        for pair in self.pairs.values():
            check_plain(pair)
        model = copy.deepcopy(self.model).eval()
        for pair in self.pairs.values():
            weight, bias = pair.merged()
            layer = model.get_submodule(pair.layer_name)
            layer.weight = nn.Parameter(weight.detach().clone())
            layer.bias = nn.Parameter(bias.detach().clone())
            _put(model, pair.norm_name, nn.Identity())
        return model

    def coupled(self) -> nn.Module:
        """Copy of the model in train mode, with merged weights and live batch norm: for XK-FAC over merged weights.

        Each layer is one with the batch norm after it. A layer's own statistics are constants, as they are in ``W̃``,
        while the examples of a batch act on each other through every batch norm behind it (compare `folded`, where
        they do not act on each other at all).

        Returns:
            A model in train mode with the parameters of `folded`, for `kronfac.estimate`; not for training.

        Raises:
            ValueError: If a layer is of a kind of its own, whose forward could not be kept, its weight is computed from
                other parameters, or batch norm is synchronised.
        """  # noqa: DOC502
        for pair in self.pairs.values():
            check_plain(pair)
        model = copy.deepcopy(self.model).train()
        for pair in self.pairs.values():
            _put(model, pair.layer_name, normalising(pair, model.get_submodule(pair.layer_name)))
            _put(model, pair.norm_name, nn.Identity())
        return model

    @contextmanager
    def watched(self) -> Iterator[BatchStatistics]:
        """Keep the statistics of each batch that passes through the live model in train mode.

        With these the merged weights are those of the function that the batch was shown, and their derivatives are
        right: the running statistics lag behind training, and as constants they hide that a layer's scale is divided
        out again.

        ::

            with merged.watched() as batch:
                for x, y in loader:
                    loss = F.cross_entropy(model(x), y) + penalty(merged.parameters(batch))

        Yields:
            ``{batch norm's name: (mean, variance)}`` of the newest batch, differentiable.

        Raises:
            ValueError: During a forward pass that calls a batch norm twice.
        """  # noqa: DOC502
        pairs = self.pairs.values()
        norms = {pair.norm_name: pair.norm for pair in pairs}
        with called_together(pairs), called_once(self.model, pairs), BatchStatistics(norms) as found:
            yield found

    @contextmanager
    def tracked(self, momentum: float = 0.02) -> Iterator[TrackedStatistics]:
        """Keep statistics of the live weights over many batches, to train with batch norm in train mode.

        As `watched`, with less noise than one batch has: each layer's mean input is averaged over batches, and the
        present weights are applied to it. Running means would do as well, if they were not those of weights that have
        moved since. Variances have the value of the running ones and the derivatives of the newest batch's.

        Args:
            momentum: Share of the newest batch in the averages.

        Yields:
            ``{batch norm's name: (mean, variance)}``, differentiable; inputs must keep their size.

        Raises:
            ValueError: If the momentum is not in (0, 1].
        """
        if not 0.0 < momentum <= 1.0:
            raise ValueError(f"momentum must be in (0, 1], got {momentum}")
        pairs = {pair.norm_name: pair for pair in self.pairs.values()}
        with called_together(pairs.values()), TrackedStatistics(pairs, momentum) as found:
            yield found

    def statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Running statistics of this moment.

        Returns:
            ``{batch norm's name: (mean, variance)}``, copies.
        """
        return {
            pair.norm_name: (statistic(pair.norm.running_mean).clone(), statistic(pair.norm.running_var).clone())
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
        check_statistics(self.pairs.values(), statistics)
        pairs = {pair.norm_name: pair for pair in self.pairs.values()}
        for name, (mean, variance) in statistics.items():
            if pairs[name].norm.weight is None or pairs[name].norm.bias is None:
                raise ValueError(f"batch norm {name!r} has affine=False: nothing can take the change up")
            if not bool((torch.isfinite(mean) & torch.isfinite(variance) & (variance >= 0)).all()):
                raise ValueError(f"the statistics of {name!r} must be finite, and the variance not negative")
        for name, (mean, variance) in statistics.items():
            pairs[name].reparameterise(mean, variance)

    def restandardise(self, inputs: Iterable[Any]) -> None:
        """Set the running statistics to means over new data, without changing the model's function in eval mode.

        So that a new task begins with the old function under its own statistics. They are those that the activations
        have in the model in eval mode, pooled over all batches, so that the function in train mode is the old one as
        well, but for the differences between batches.

        Args:
            inputs: Batches of inputs.

        Raises:
            ValueError: If there is none, a batch norm has no γ and β, or the model does not call a layer and its batch
                norm as one. Nothing is changed then.
        """  # noqa: DOC502
        self.reparameterise(measured(self.model, self.pairs.values(), inputs))

    def check(self, inputs: Any, tolerance: float = 1e-5) -> None:
        """Compare the live model in eval mode with the merged one.

        Args:
            inputs: A batch.
            tolerance: Largest difference, relative to the largest output.

        Raises:
            ValueError: If they differ: a pairing is wrong, or a batch norm does not act on its layer's outputs.
        """
        with kept_modes(self.model), torch.no_grad():
            expected, found = self.model.eval()(inputs), self.folded()(inputs)
        difference = float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-30))
        if not difference <= tolerance:
            raise ValueError(f"the merged model differs from the model in eval mode by {difference:.3g}")


def merge_batchnorm(model: nn.Module, pairs: Mapping[str, str] | None = None) -> MergedBatchNorm:
    """Merge each batch norm of a model into the linear or convolution layer before it.

    Pairs are found in the model's graph (`torch.fx`), or in the order of `torch.nn.Sequential` where it cannot be
    traced: what else the forward does with a layer is not known then. Linear layers are taken to have inputs
    ``[N, d_in]``. Whatever passes batches through the model refuses other calls; `MergedBatchNorm.check` compares
    outputs on a batch.

    Args:
        model: The model; of one that was compiled, or wrapped for parallel runs, it is the module inside.
        pairs: ``{layer's name: batch norm's name}``, for all batch norms, instead of searching.

    Returns:
        The merged view; the model is not changed.

    Raises:
        TypeError: If the model is no module.
        ValueError: If a batch norm cannot be paired, has no running statistics, does not fit its layer, or if one of
            the two is also used elsewhere; the message names it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    model = eager_root(model)  # in which the hooks of layers are heard
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
        check_pair(pair)
    check_uses(model, result.values())
    return MergedBatchNorm(model, result)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in another's place, under all the names that it has."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for own in [key for key, child in parent.named_children() if child is old]:
            setattr(parent, own, module)
