"""Weights of a task's loss against the penalty of the tasks before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from kronfac.continual.base import check_strength

#: From a task's loss and the penalty, what is to be brought to one magnitude: two 0-dim tensors, without a graph.
Magnitudes = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


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


def values(task_loss: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """Take the two losses themselves.

    Args:
        task_loss: The task's loss.
        penalty: The penalty.

    Returns:
        Both, without a graph.
    """
    return task_loss.detach(), penalty.detach()


class RunningMeans:
    """Exponential means of the two losses over the calls so far, so that the factors do not follow single batches.

    Args:
        decay: Weight of what is old, at least 0 and below 1.

    Raises:
        ValueError: If ``decay`` is out of range.
    """

    def __init__(self, decay: float = 0.9) -> None:
        if check_strength("decay", decay) >= 1:
            raise ValueError(f"decay must be below 1, got {decay!r}")
        self.decay = decay
        self._sums: tuple[Tensor, Tensor] | None = None
        self._weight = 0.0

    def __call__(self, task_loss: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
        """Take the losses of a step in.

        Args:
            task_loss: The task's loss.
            penalty: The penalty.

        Returns:
            The means, those of one call being its losses.
        """
        now = values(task_loss, penalty)
        old = self._sums or (torch.zeros_like(now[0]), torch.zeros_like(now[1]))
        new = 1 - self.decay
        first, second = (self.decay * was + new * value for was, value in zip(old, now, strict=True))
        self._sums, self._weight = (first, second), self.decay * self._weight + new
        return first / self._weight, second / self._weight


class GradientNorms:
    """Norms of the gradients of the two losses: what is balanced is how hard each pulls. Costs a further backward pass.

    Args:
        parameters: What the gradients are taken in.

    Raises:
        ValueError: If none of them is trainable.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        if not self.parameters:
            raise ValueError("gradient norms need a parameter that requires a gradient")

    def __call__(self, task_loss: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
        """Differentiate both; their graphs are kept.

        Args:
            task_loss: The task's loss.
            penalty: The penalty.

        Returns:
            The norms.
        """
        return self._norm(task_loss), self._norm(penalty)

    def _norm(self, loss: Tensor) -> Tensor:
        gradients = torch.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True)
        norms = [torch.linalg.vector_norm(g) for g in gradients if g is not None]
        return torch.stack(norms or [loss.new_zeros(())]).norm()


def balance(
    task_loss: Tensor,
    penalty: Tensor,
    tasks: int,
    *,
    adaptive: bool = True,
    limit: float = 100.0,
    magnitudes: Magnitudes = values,
) -> Balanced:
    """Weigh a new task's loss against the penalty of the tasks learned before.

    ``λ_s = T / (T + 1)`` and ``λ_t = 1 / (T + 1)`` count every task once. ``α_s`` and ``α_t`` (Lee et al. 2020, A.6)
    bring the two losses to the same magnitude. Of their definition we have the purpose alone; this is **our
    reconstruction**: the smaller of ``|L_t|`` and ``P`` is multiplied by ``larger / smaller``, at most by ``limit``,
    the larger one by 1, and no gradient flows through the factors. The limit is needed because the penalty is zero when
    a task begins. `RunningMeans` and `GradientNorms` are other readings of *magnitude*.

    Args:
        task_loss: ``L_t``, 0-dim; its sign, such as that of a density's logarithm, does not count.
        penalty: ``P``, 0-dim, not negative.
        tasks: ``T``, how many tasks the penalty stands for, at least 1.
        adaptive: Whether to use the factors α; otherwise they are 1.
        limit: The largest factor α, at least 1.
        magnitudes: What of the two is brought to the same size: by default the losses of this step.

    Returns:
        The loss and its weights.

    Raises:
        TypeError: If a loss is no tensor of floating point or ``tasks`` no integer.
        ValueError: If a loss is no scalar, or a number is out of range.
    """
    for name, value in (("task_loss", task_loss), ("penalty", penalty)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.ndim:
            raise ValueError(f"{name} must be a scalar, got shape {tuple(value.shape)}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be of floating point, got {value.dtype}")
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
        task, old = (torch.as_tensor(value).abs() for value in magnitudes(task_loss, penalty))
        old = old.to(task)
        tiny = torch.finfo(task.dtype).tiny
        alpha_task = (old / task.clamp(min=tiny)).clamp(1.0, limit).to(task_loss.dtype)
        alpha_penalty = (task / old.clamp(min=tiny)).clamp(1.0, limit).to(penalty.dtype)
    loss = alpha_task * lambda_task * task_loss + alpha_penalty * lambda_penalty * penalty
    return Balanced(loss, lambda_task, lambda_penalty, alpha_task.detach(), alpha_penalty.detach())
