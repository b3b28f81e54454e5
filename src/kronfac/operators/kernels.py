"""Kernels that can be differentiated forward, and twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kronfac.threads import ForAllThreads


@contextmanager
def plain_kernels(model: nn.Module) -> Iterator[None]:
    """Avoid the fused kernels of attention and recurrent layers: they have no forward and no second derivatives.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with _PLAIN_ATTENTION(), _PLAIN_RECURRENCE() if recurrent else nullcontext():
        yield


@contextmanager
def _plain_attention() -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _plain_recurrence() -> Iterator[None]:
    backends: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
    before = [backend.enabled for backend in backends]
    for backend in backends:
        backend.enabled = False
    try:
        yield
    finally:
        for backend, enabled in zip(backends, before, strict=True):
            backend.enabled = enabled


_PLAIN_ATTENTION, _PLAIN_RECURRENCE = ForAllThreads(_plain_attention), ForAllThreads(_plain_recurrence)
