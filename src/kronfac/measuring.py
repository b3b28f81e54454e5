"""Measuring a model without a trace in its training: whose forwards count, buffers put back, examples that depend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

#: Whether forwards belong to a measurement and not to a training loop.
_APART: ContextVar[bool] = ContextVar("kronfac_apart_from_training", default=False)


@contextmanager
def apart_from_training() -> Iterator[None]:
    """Mark forwards within the block as measurements, of which optimisers that watch the model gather nothing.

    Yields:
        Nothing.
    """
    token = _APART.set(True)
    try:
        yield
    finally:
        _APART.reset(token)


def is_marked_apart() -> bool:
    """Whether the present forward is within :func:`apart_from_training`."""
    return _APART.get()


def is_apart_from_training() -> bool:
    """Whether the present forward is a measurement, or runs under a transform of `torch.func`."""
    return is_marked_apart() or torch._C._functorch.peek_interpreter_stack() is not None


@contextmanager
def frozen_buffers(model: nn.Module) -> Iterator[None]:
    """Put back every buffer (running statistics of batch norm) at the end of the block.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    saved = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in saved:
                    buffer.copy_(saved[name])


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Put every module back into the mode, train or eval, that it is in now.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def couples_examples(model: nn.Module) -> bool:
    """Whether a layer in train mode makes each example's output depend on the others (batch norm).

    Args:
        model: The model.

    Returns:
        True if so.
    """
    batch_norm = nn.modules.batchnorm._BatchNorm
    return any(isinstance(m, batch_norm) and (m.training or m.running_mean is None) for m in model.modules())
