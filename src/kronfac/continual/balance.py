"""Weights of a task's loss against the penalty of the tasks before it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kronfac.continual.base import check_strength


class Balanced(NamedTuple):
    """A loss with the weights that made it.

    Attributes:
        loss: ``α_t λ_t L_t + α_s λ_s P``, 0-dim, differentiable in both.
        lambda_task: ``λ_t = 1 / (T + 1)``.
        lambda_penalty: ``λ_s = T / (T + 1)``.
        alpha_task: ``α_t``, 0-dim, without a graph.
        alpha_penalty: ``α_s``, 0-dim, without a graph.
    """

    loss: Tensor
    lambda_task: float
    lambda_penalty: float
    alpha_task: Tensor
    alpha_penalty: Tensor


def balance(task_loss: Tensor, penalty: Tensor, tasks: int, *, adaptive: bool = True, limit: float = 100.0) -> Balanced:
    """Weigh a new task's loss against the penalty of the tasks learned before.

    ``λ_s = T / (T + 1)`` and ``λ_t = 1 / (T + 1)`` count every task once. ``α_s`` and ``α_t`` (Lee et al. 2020, A.6)
    bring the two losses to the same magnitude. Of their definition we have the purpose alone; this is **our
    reconstruction**: the smaller of ``L_t`` and ``P`` is multiplied by ``larger / smaller``, at most by ``limit``, the
    larger one by 1, and no gradient flows through the factors. The limit is needed because the penalty is zero when a
    task begins.

    Args:
        task_loss: ``L_t``, 0-dim, not negative.
        penalty: ``P``, 0-dim, not negative.
        tasks: ``T``, how many tasks the penalty stands for, at least 1.
        adaptive: Whether to use the factors α; otherwise they are 1.
        limit: The largest factor α, at least 1.

    Returns:
        The loss and its weights.

    Raises:
        TypeError: If a loss is no tensor or ``tasks`` no integer.
        ValueError: If a loss is no scalar, or a number is out of range.
    """
    for name, value in (("task_loss", task_loss), ("penalty", penalty)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.ndim:
            raise ValueError(f"{name} must be a scalar, got shape {tuple(value.shape)}")
    if isinstance(tasks, bool) or not isinstance(tasks, int):
        raise TypeError(f"tasks must be an integer, got {tasks!r}")
    if tasks < 1:
        raise ValueError(f"tasks must be at least 1, got {tasks}")
    if check_strength("limit", limit) < 1:
        raise ValueError(f"limit must be at least 1, got {limit!r}")
    lambda_task, lambda_penalty = 1 / (tasks + 1), tasks / (tasks + 1)
    alpha_task, alpha_penalty = torch.ones_like(task_loss), torch.ones_like(penalty)
    if adaptive:
        # No branch on values: a step waits for no transfer from the device.
        task, old = task_loss.detach(), penalty.detach().to(task_loss.dtype)
        tiny = torch.finfo(task.dtype).tiny
        alpha_task = (old / task.clamp(min=tiny)).clamp(1.0, limit)
        alpha_penalty = (task / old.clamp(min=tiny)).clamp(1.0, limit).to(penalty.dtype)
    loss = alpha_task * lambda_task * task_loss + alpha_penalty * lambda_penalty * penalty
    return Balanced(loss, lambda_task, lambda_penalty, alpha_task.detach(), alpha_penalty.detach())
