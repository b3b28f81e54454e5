"""How well a network does on the tasks of a stream."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kronfac.experiments.continual.tasks import Task


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> float:
    """Share of a task's test set that is classified correctly, in eval mode.

    Args:
        model: The network.
        task: The task.

    Returns:
        From 0 to 1.
    """
    training = model.training
    model.eval()
    right = 0
    for inputs, targets in task.tests(1000):
        right += int((task.outputs(model(inputs)).argmax(1) == targets).sum())
    model.train(training)
    return right / len(task.test_targets)


@torch.no_grad()
def adapted(model: nn.Module, tasks: Sequence[Task]) -> list[float] | None:
    """Accuracy on each task with the statistics of the test batches themselves: the function in train mode.

    Running statistics are those of the newest task alone; these show what the weights still know of the others.

    Args:
        model: The network; its running statistics are left as they are.
        tasks: The tasks.

    Returns:
        From 0 to 1 for each task; None without batch norm.
    """
    twin = copy.deepcopy(model)
    norms = [module for module in twin.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return None
    for norm in norms:  # in eval mode, too, a batch norm without running statistics takes the batch's
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    return [accuracy(twin, task) for task in tasks]
