"""Statistics of the activations that batch norm sees: of each training batch, and of new data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from kronfac.continual.pairs import Pair, statistic
from kronfac.continual.uses import called_together
from kronfac.measuring import kept_modes


class BatchStatistics(Mapping[str, tuple[Tensor, Tensor]]):
    """Mean and (biased) variance of the newest batch at each batch norm in train mode, differentiable.

    A context: hooks are set when it is entered and removed when it is left. An entry is there once a batch has passed
    in train mode, and gone after one in eval mode.

    Args:
        norms: Batch norms by name.
    """

    def __init__(self, norms: Mapping[str, _BatchNorm]) -> None:
        self._norms = dict(norms)
        self._found: dict[str, tuple[Tensor, Tensor]] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, norm in self._norms.items():

            def keep(module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                self._found.pop(name, None)
                if module.training:
                    variance, mean = torch.var_mean(inputs[0], _axes(inputs[0]), correction=0)
                    self._found[name] = (mean, variance)

            self._handles.append(norm.register_forward_pre_hook(keep))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._found.clear()

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    @property
    def blind(self) -> bool:
        """Whether there are batch norms in train mode, and no batch was seen at any."""
        return not self._found and any(norm.training for norm in self._norms.values())


class TrackedStatistics(BatchStatistics):
    """Statistics of the live weights over many batches: without the noise of one batch, and without lagging behind.

    Running means are those of weights that have moved since, and a layer's mean output moves most. Here a layer's mean
    *input* is averaged over batches, and the present weights are applied to that. Variances are the running ones, with
    the derivatives of the newest batch's.

    Args:
        pairs: Layers with their batch norms, by the batch norm's name.
        momentum: Share of the newest batch in the average of inputs; the first batches share it alike.
    """

    def __init__(self, pairs: Mapping[str, Pair], momentum: float) -> None:
        super().__init__({name: pair.norm for name, pair in pairs.items()})
        self._pairs, self._momentum = dict(pairs), momentum
        self._inputs: dict[str, tuple[Tensor, int]] = {}

    def __enter__(self) -> Self:
        super().__enter__()
        for name, pair in self._pairs.items():

            def average(module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                if module.training:
                    x = inputs[0].detach()
                    self._average(name, x.mean(0, dtype=torch.promote_types(x.dtype, torch.float32)))

            self._handles.append(pair.layer.register_forward_pre_hook(average))
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._inputs.clear()

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        layer, norm = self._pairs[name].layer, self._norms[name]
        _, variance = super().__getitem__(name)
        # In the weight's dtype: under autocast the batch's is less, and so would be that of the outputs.
        mean = self._inputs[name][0].to(self._pairs[name].weight.dtype)
        with torch.autocast(mean.device.type, enabled=False):
            # `forward` and not a call: hooks are for batches.
            outputs = layer.forward(mean[None])
        units = outputs.ndim - 1 if isinstance(layer, nn.Linear) else 1
        return outputs.mean(_axes(outputs, units)), statistic(norm.running_var) + (variance - variance.detach())

    def _average(self, name: str, mean: Tensor) -> None:
        before, count = self._inputs.get(name, (mean, 0))
        if before.shape != mean.shape:
            raise ValueError(
                f"the inputs of {self._pairs[name].layer_name!r} changed from {tuple(before.shape)} to "
                f"{tuple(mean.shape)}: averages over batches need inputs of one size; use watched()"
            )
        self._inputs[name] = (before.lerp(mean, max(self._momentum, 1.0 / (count + 1))), count + 1)


def check_statistics(pairs: Iterable[Pair], statistics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Refuse statistics that are of other batch norms, or that are absent where they should not be.

    Args:
        pairs: Layers and batch norms.
        statistics: ``{batch norm's name: (mean, variance)}``, for some or all of them.

    Raises:
        ValueError: If a name is unknown, a shape does not fit, or no batch was seen at batch norms in train mode.
    """
    norms = {pair.norm_name: pair.norm for pair in pairs}
    if unknown := [name for name in statistics if name not in norms]:
        raise ValueError(f"there is no merged batch norm {unknown[0]!r}; there are {sorted(norms)}")
    if isinstance(statistics, BatchStatistics):
        if statistics.blind:
            # With the running ones instead, what train mode divides out would be hidden without a word.
            raise ValueError(
                "no batch was seen at the batch norms, which are in train mode: call the model within the block, and "
                "before its merged parameters. What torch.compile made is not heard: call the module inside"
            )
        return
    for name, (mean, variance) in statistics.items():
        shape = statistic(norms[name].running_mean).shape
        if mean.shape != shape or variance.shape != shape:
            raise ValueError(f"the statistics of {name!r} must have shape {tuple(shape)}")


def measured(model: nn.Module, pairs: Iterable[Pair], inputs: Iterable[Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Measure what each batch norm of a model in eval mode sees.

    Args:
        model: The model; its modes are restored.
        pairs: Its layers and batch norms.
        inputs: Batches of inputs.

    Returns:
        Mean and unbiased variance over all batches together, by name.

    Raises:
        ValueError: If there is no batch, or a layer and its batch norm are not called as one.
    """
    pairs = list(pairs)
    norms = {pair.norm_name: pair.norm for pair in pairs}
    # Sums about the first batch's mean: squares of a large mean would drown a small variance.
    centres: dict[str, Tensor] = {}
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    handles = []
    for name, norm in norms.items():

        def add(module: nn.Module, given: tuple[Any, ...], name: str = name) -> None:
            x = given[0].detach()
            axes, count = _axes(x), x.numel() // x.shape[1]
            variance, mean = torch.var_mean(x.double(), axes, correction=0)
            shift = mean - centres.setdefault(name, mean)
            first, second, total = sums.get(name, (torch.zeros_like(mean), torch.zeros_like(mean), 0))
            sums[name] = (first + count * shift, second + count * (variance + shift.square()), total + count)

        handles.append(norm.register_forward_pre_hook(add))
    try:
        with kept_modes(model), called_together(pairs) as check, torch.no_grad():
            model.eval()
            for batch in inputs:
                model(batch)
                check()
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        raise ValueError("inputs is empty: no batch to take statistics from")
    found = {}
    for name, (first, second, total) in sums.items():
        mean = first / total
        variance = (second / total - mean.square()).clamp(min=0) * (total / max(total - 1, 1))
        dtype = statistic(norms[name].running_mean).dtype
        found[name] = ((centres[name] + mean).to(dtype), variance.to(dtype))
    return found


def _axes(x: Tensor, channels: int = 1) -> list[int]:
    return [axis for axis in range(x.ndim) if axis != channels]
