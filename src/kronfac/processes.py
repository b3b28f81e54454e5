"""What the processes of a distributed run tell each other, and which of them belong together.

Those of the default group do, unless the model is wrapped for another one (`DistributedDataParallel` with
``process_group=``), or something is asked of one process by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

#: The group that sums are over, None for the default one; and whether this process is by itself.
_GROUP: ContextVar[Any] = ContextVar("kronfac_process_group", default=None)
_ALONE: ContextVar[bool] = ContextVar("kronfac_alone", default=False)


def together() -> bool:
    """Whether this is a process of a distributed run, whose sums are over all of its group.

    Returns:
        True if so.
    """
    distributed = torch.distributed
    return not _ALONE.get() and distributed.is_available() and distributed.is_initialized()


def several() -> bool:
    """Whether there are other processes than this one.

    Returns:
        True if so.
    """
    return together() and count() > 1


def count() -> int:
    """Number of processes that belong together; one outside of distributed runs."""
    return torch.distributed.get_world_size(**_options()) if together() else 1


def rank() -> int:
    """Number of this process among those that belong together; zero outside of distributed runs."""
    return torch.distributed.get_rank(**_options()) if together() else 0


def add_up(tensor: Tensor) -> None:
    """Sum a tensor over the processes, in place.

    Args:
        tensor: The tensor.
    """
    torch.distributed.all_reduce(tensor, **_options())


def largest(tensor: Tensor) -> None:
    """Take the largest entries of all processes, in place.

    Args:
        tensor: The tensor.
    """
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, **_options())


def agree_on(tensor: Tensor) -> None:
    """Take the tensor of the first process, in place.

    Args:
        tensor: The tensor.
    """
    group = _GROUP.get()
    first = 0 if group is None else torch.distributed.get_global_rank(group, 0)
    torch.distributed.broadcast(tensor, first, **_options())


def collect(tensor: Tensor) -> list[Tensor]:
    """Tensors of all processes.

    Args:
        tensor: This process's, of the same shape as theirs.

    Returns:
        By rank.
    """
    found = [torch.empty_like(tensor) for _ in range(count())]
    torch.distributed.all_gather(found, tensor, **_options())
    return found


def mean_of(value: float, device: torch.device) -> float:
    """Mean of a number over the processes, so that each of them decides alike; each must call this.

    Args:
        value: This process's number.
        device: Device of the tensors that the processes exchange.

    Returns:
        The mean, or the number itself outside of distributed runs.
    """
    return sum_of(value, device) / count() if together() else value


def sum_of(value: float, device: torch.device) -> float:
    """Sum of a number over the processes; each must call this.

    Args:
        value: This process's number.
        device: Device of the tensors that the processes exchange.

    Returns:
        The sum, or the number itself outside of distributed runs.
    """
    if not together():
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    add_up(total)
    return float(total)


def wrapper_of(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """What exchanges the gradients of a model.

    Args:
        model: The module that the training loop calls.

    Returns:
        It, or a part of it; None if no part of it is wrapped.
    """
    parallel = nn.parallel.DistributedDataParallel
    return next((module for module in model.modules() if isinstance(module, parallel)), None)


def group_of(wrapper: nn.parallel.DistributedDataParallel | None) -> Any:
    """Which processes train a model together.

    Args:
        wrapper: What exchanges its gradients, if anything does.

    Returns:
        Their group; None for the default one.
    """
    group = None if wrapper is None else wrapper.process_group
    return None if group is None or group is torch.distributed.GroupMember.WORLD else group


def refuse_join(wrapper: nn.parallel.DistributedDataParallel | None) -> None:
    """Refuse processes that stop before others: they answer what the wrapper asks of them, and nothing else.

    Args:
        wrapper: What exchanges gradients, if anything does.

    Raises:
        RuntimeError: It is within its ``join()``.
    """
    config = None if wrapper is None else wrapper._join_config
    if config is not None and config.enable and not config.throw_on_early_termination:
        raise RuntimeError(
            "Within join() a process that has no data left takes no steps, in which the others would wait for its "
            "statistics for ever. Give all processes as many batches (drop_last=True), or use "
            "join(throw_on_early_termination=True)."
        )


@contextmanager
def of(group: Any) -> Iterator[None]:
    """Let sums within the block be over the processes of a group.

    Args:
        group: The group; None for the default one.

    Yields:
        Nothing.
    """
    token = _GROUP.set(group)
    try:
        yield
    finally:
        _GROUP.reset(token)


@contextmanager
def alone() -> Iterator[None]:
    """Let sums within the block be those of this process by itself, which no other need wait for.

    Yields:
        Nothing.
    """
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def _options() -> dict[str, Any]:
    group = _GROUP.get()
    return {} if group is None else {"group": group}
