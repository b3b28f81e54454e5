"""Batch norm's statistics of earlier tasks under the present weights, without their data.

What a layer ``z = W a + b`` gives to batch norm has mean and variance

    μ = W E[a] + b,    v = diag(W Cov(a) Wᵀ)

whatever ``W`` is by now. ``Cov(a)`` is the input factor of XK-FAC at such a layer, up to ``N/(N-1)``. So a task leaves
the moments of its layers' inputs behind, and its statistics follow the weights. That is ours; it is exact for layers
whose inputs did not change since, the first one above all, and the deeper a layer lies, the staler its moments become.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kronfac.continual.batchnorm import merge_batchnorm
from kronfac.continual.pairs import Pair, check_plain, statistic
from kronfac.continual.uses import called_together
from kronfac.layers.base import LayerAdapter, UnsupportedLayer
from kronfac.layers.registry import adapt, require_known_forward
from kronfac.linalg.symmetric import mirror_
from kronfac.measuring import frozen_buffers, kept_modes
from kronfac.storage import StorageError, read_file, write_file

_FORMAT = "kronfac.task-statistics"

#: Mean ``[*groups, d]`` and covariance ``[*groups, d, d]`` of a layer's inputs, or of its patches.
Moments = tuple[Tensor, Tensor]


class TaskStatistics:
    """Input moments of every layer before a batch norm, for each task: what makes its statistics for any weights.

    ::

        statistics = kf.continual.TaskStatistics(model)
        ...  # learn task A
        statistics.remember("A", inputs)
        ...  # learn other tasks
        with statistics.using("A"):
            outputs = model.eval()(x)

    A task takes the memory of the layers' input factors. Which task an input is of must be known.

    Args:
        model: The live model; it is referred to, so that statistics are those of the weights of the moment.
        pairs: ``{layer's name: batch norm's name}``, see `merge_batchnorm`.

    Raises:
        TypeError: If the model is no module.
        ValueError: If a batch norm has no layer right before it, or keeps no running statistics.
    """

    def __init__(self, model: nn.Module, pairs: Mapping[str, str] | None = None) -> None:
        merged = merge_batchnorm(model, pairs)
        self.model, self._pairs = merged.model, merged.pairs
        self._tasks: dict[str, dict[str, Moments]] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that were remembered."""
        return tuple(self._tasks)

    def remember(self, task: str, inputs: Iterable[Any]) -> None:
        """Take in the input moments of a task that was learned; they replace those of the same name.

        Batch norms take each batch's own statistics, everything else is in eval mode. The model is left as it was.

        Args:
            task: The task's name.
            inputs: Batches of its inputs, of two examples at least; the larger, the better.

        Raises:
            TypeError: If the task's name is no text.
            ValueError: If there is no batch, a layer is called on none or its inputs are not finite, its weight is
                computed from other parameters, or the model does not call it and its batch norm as one.
        """
        if not isinstance(task, str):  # as which it would come back from a file
            raise TypeError(f"task must be a name, got {task!r}")
        adapters = {name: _adapter(pair) for name, pair in self._pairs.items()}
        sums: dict[str, tuple[Tensor, Tensor, float]] = {}
        with ExitStack() as stack, torch.no_grad():
            for name, adapter in adapters.items():
                stack.callback(self._watch(name, adapter, sums).remove)
            stack.enter_context(frozen_buffers(self.model))
            stack.enter_context(kept_modes(self.model))
            for module in self.model.modules():
                module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
            check = stack.enter_context(called_together(self._pairs.values()))
            for batch in inputs:
                self.model(batch)
                check()
        if not sums:
            raise ValueError("inputs is empty: no batch to take moments from")
        if unseen := [name for name in adapters if name not in sums]:
            raise ValueError(
                f"the model called {unseen} on none of the inputs, so that nothing is known of what comes out of them; "
                f"nothing was remembered of task {task!r}"
            )
        found = {name: _moments(*sums[name], self._pairs[name]) for name in adapters}
        if wrong := [name for name, (_, covariance) in found.items() if not bool(covariance.isfinite().all())]:
            raise ValueError(f"the inputs of {wrong} are not finite; nothing was remembered of task {task!r}")
        self._tasks[task] = found

    def statistics(self, task: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Give a task's statistics under the weights of this moment.

        Args:
            task: The task's name.

        Returns:
            ``{batch norm's name: (mean, unbiased variance)}``: what its running statistics would be.

        Raises:
            ValueError: If the task is unknown.
        """
        if task not in self._tasks:
            raise ValueError(f"nothing is known of task {task!r}; there are {list(self._tasks)}")
        with torch.no_grad():
            return {
                pair.norm_name: _through(_adapter(pair), pair, self._tasks[task][name])
                for name, pair in self._pairs.items()
            }

    @contextmanager
    def using(self, task: str) -> Iterator[None]:
        """Let the model's running statistics be a task's within the block, and what they were after it.

        Args:
            task: The task's name.

        Yields:
            Nothing.

        Raises:
            ValueError: If the task is unknown.
        """  # noqa: DOC502
        found = self.statistics(task)
        norms = {pair.norm_name: pair.norm for pair in self._pairs.values()}
        with frozen_buffers(self.model):  # which puts the tensors of before back
            for name, (mean, variance) in found.items():
                # Other tensors and not other values: graphs hold the ones they were made with until their backward.
                norms[name].running_mean, norms[name].running_var = mean, variance
            yield

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the moments of all tasks in a safetensors file.

        Args:
            path: Where to; the file appears whole or not at all.
        """
        tensors = {
            f"{t}.{key}.{layer}": tensor
            for t, found in enumerate(self._tasks.values())
            for layer, moments in found.items()
            for key, tensor in zip(("mean", "covariance"), moments, strict=True)
        }
        write_file(path, tensors, {"tasks": list(self._tasks)}, _FORMAT)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take the moments that `save` wrote in place of those here.

        Args:
            path: The file.

        Raises:
            StorageError: If it is damaged, or of a model with other layers; nothing is changed then.
        """
        tensors, content = read_file(Path(path), _FORMAT, "set of task statistics")
        try:
            tasks = {
                str(task): {name: _read(path, tensors, f"{t}.{{}}.{name}", pair) for name, pair in self._pairs.items()}
                for t, task in enumerate(content["tasks"])
            }
        except (KeyError, TypeError) as error:
            raise StorageError(f"{path} is damaged, or of a model with other layers ({error!r})") from error
        self._tasks = tasks

    def _watch(
        self, name: str, adapter: LayerAdapter, sums: dict[str, tuple[Tensor, Tensor, float]]
    ) -> RemovableHandle:
        """Add up the rows of each input of a layer, and their products, in float64."""

        def add(module: nn.Module, given: tuple[Any, ...]) -> None:
            x = given[0].detach().double()
            shape = (*adapter.stack, adapter.d_in)
            first, second, count = sums.get(name) or (x.new_zeros(shape), x.new_zeros(*shape, shape[-1]), 0.0)
            # Patches are linear in the input, so that the mean input has their means.
            rows = adapter.expand(x.mean(0, keepdim=True))[0].mean(0)
            more = float(adapter.add_input_gram_(second, x))
            sums[name] = (first + more * rows, second, count + more)

        return self._pairs[name].layer.register_forward_pre_hook(add)


def _adapter(pair: Pair) -> LayerAdapter:
    """See the layer's weight as a matrix, whatever of the layer is trained."""
    check_plain(pair)
    try:
        require_known_forward(pair.layer)
    except UnsupportedLayer as error:
        raise ValueError(
            f"nothing can be told of layer {pair.layer_name!r}'s outputs by its inputs: {error}"
        ) from error
    layer = copy.copy(pair.layer)
    layer._parameters = {"weight": nn.Parameter(pair.weight.detach()), "bias": None}
    return adapt(layer, pair.layer_name)


def _moments(first: Tensor, second: Tensor, count: float, pair: Pair) -> Moments:
    mean = first / count
    covariance = mirror_(second).div_(count) - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    covariance *= count / max(count - 1.0, 1.0)
    return mean.to(pair.weight.dtype), covariance.to(pair.weight.dtype)


def _through(adapter: LayerAdapter, pair: Pair, moments: Moments) -> tuple[Tensor, Tensor]:
    """Give mean and variance of a layer's outputs, ``[d_out]`` each, in the dtype of the running statistics."""
    weight = adapter.pack({adapter.weight_key: pair.weight})
    # The model may have been converted or moved since, or the moments be another's: the finer of both dtypes it is.
    dtype = torch.promote_types(weight.dtype, moments[0].dtype)
    weight, mean, covariance = (x.to(weight.device, dtype) for x in (weight, *moments))
    with torch.autocast(weight.device.type, enabled=False):
        outputs = (weight @ mean.unsqueeze(-1)).flatten()
        variance = ((weight @ covariance) * weight).sum(-1).flatten().clamp(min=0)
    if isinstance(pair.layer.bias, Tensor):
        outputs = outputs + pair.layer.bias
    running = statistic(pair.norm.running_mean).dtype
    return outputs.to(running), variance.to(running)


def _read(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], key: str, pair: Pair) -> Moments:
    mean, covariance = (tensors[key.format(part)].to(pair.weight.device) for part in ("mean", "covariance"))
    adapter = _adapter(pair)
    if mean.shape != (*adapter.stack, adapter.d_in) or covariance.shape != (*mean.shape, adapter.d_in):
        raise StorageError(f"{path}: the moments of layer {pair.layer_name!r} do not fit its weight")
    return mean, covariance
