"""What curvature is estimated on: batches of an experience of Avalanche, and the parameters they pass through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.data import default_collate

from kronfac.eager import eager_root
from kronfac.forwards import call_model, pick_outputs
from kronfac.graph import unreached
from kronfac.measuring import apart_from_training, couples_examples, frozen_buffers
from kronfac.operators.passes import RandomStream


def data_of(strategy: Any, *, first: bool) -> Any:
    """Choose the data that an experience is taken in by.

    Args:
        strategy: The strategy.
        first: Whether nothing was taken in before.

    Returns:
        ``strategy.adapted_dataset``. Where that also holds earlier experiences, as with ``Cumulative``, which were
        taken in already, it is the experience's own data. A first experience is not alone in it with
        ``JointTraining``, which trains once on all of them.
    """
    own = strategy.experience.dataset
    adapted = getattr(strategy, "adapted_dataset", None)
    if adapted is None or (not first and len(adapted) > len(own)):
        return own.train() if adapted is not None and hasattr(own, "train") else own
    return adapted


def batches_of(dataset: Any, model: nn.Module, examples: int, size: int, seed: int) -> Iterator[tuple[Any, Any]]:
    """Draw examples and give them in batches, as the strategy's own loader makes them.

    Args:
        dataset: Its items are ``(input, target, …)``, with a task label at the end for a multi-task model.
        model: The model. To one of Avalanche's multi-task models, which have ``forward_single_task``, labels are given
            too, and a batch has one of them.
        examples: How many examples, at most.
        size: Of a batch.
        seed: Of the examples drawn.

    Yields:
        Inputs and targets on the model's device.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:examples]
    device = next(model.parameters()).device
    collate = getattr(dataset, "collate_fn", None) or default_collate
    labelled = hasattr(eager_root(model), "forward_single_task")
    groups: dict[int, list[Any]] = {}
    for row in order:
        item = dataset[int(row)]
        groups.setdefault(int(item[-1]) if labelled else 0, []).append(item)
    # Batch norm in train mode has no function of one example. Where all batches have one, torch says so itself.
    skips = size > 1 and len(order) > 1 and couples_examples(model)
    for items in groups.values():
        for start in range(0, len(items), size):
            chosen = items[start : start + size]
            if skips and len(chosen) == 1:
                continue
            batch = collate(chosen)
            inputs, targets = batch[0].to(device), batch[1].to(device)
            yield ((inputs, batch[-1].to(device)) if labelled else inputs), targets


@contextmanager
def without_unused(model: nn.Module, batches: Iterable[tuple[Any, Any]]) -> Iterator[None]:
    """Hold the parameters that no output depends on, as other tasks' heads, for frozen: they have no curvature.

    Args:
        model: The model.
        batches: All inputs and targets there are.

    Yields:
        Nothing.
    """
    root = eager_root(model)
    unused = _unused(root, batches)
    try:
        for parameter in unused:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in unused:
            parameter.requires_grad_()


def _unused(model: nn.Module, batches: Iterable[tuple[Any, Any]]) -> set[nn.Parameter]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    left = {parameter: get_gradient_edge(parameter).node for parameter in trained}
    draws = RandomStream(model, 0)
    for inputs, _ in batches:
        with frozen_buffers(model), apart_from_training(), draws(), torch.enable_grad():
            outputs = pick_outputs(call_model(model, inputs), None)
        left = {parameter: left[parameter] for parameter in unreached(outputs, left)}
        if not left:
            break
    return set(left)
