"""Measuring a model without a trace in its training: whose forwards count, buffers put back, examples that depend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

#: Whether forwards belong to a measurement and not to a training loop.
_APART: ContextVar[bool] = ContextVar("kronfac_apart_from_training", default=False)


@contextmanager
def apart_from_training() -> Iterator[None]:
    """Mark forwards within the block as measurements, of which optimisers that watch the model gather nothing.

    A forward with dual numbers holds the padding row of an embedding constant, as torch's backward does, and raises a
    `NotImplementedError` where the model turns gradients off.

    Yields:
        Nothing.
    """
    token = _APART.set(True)
    try:
        with _AsBackward() if forward_ad._current_level >= 0 else nullcontext():
            yield
    finally:
        _APART.reset(token)


class _AsBackward(TorchFunctionMode):
    """Lets the tangents of dual numbers stop where torch's backward does, or refuses: rules of torch go on there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # From off to off: from on to off is the end of an enable_grad.
        if func is torch._C._set_grad_enabled and not args[0] and not torch.is_grad_enabled():
            raise NotImplementedError("Forward derivatives do not stop at torch.no_grad().")
        if func is F.embedding:
            return _embedded(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _embedded(input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.nn.functional.embedding`, whose padding row has no tangent."""
    output = F.embedding(input, weight, padding_idx, *args, **kwargs)
    if padding_idx is None:
        return output
    padding = (input == padding_idx % len(weight)).unsqueeze(-1)
    return torch.where(padding, output.detach(), output)


def is_marked_apart() -> bool:
    """Whether the present forward is within :func:`apart_from_training`."""
    return _APART.get()


def is_apart_from_training() -> bool:
    """Whether the present forward is a measurement, or runs under a transform of `torch.func`."""
    return is_marked_apart() or torch._C._functorch.peek_interpreter_stack() is not None


def is_transformed() -> bool:
    """Whether a transform of `torch.func`, or forward-mode differentiation, is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def remembered_buffers(model: nn.Module) -> Callable[[], None]:
    """Remember every buffer (running statistics of batch norm).

    Args:
        model: The model.

    Returns:
        Puts them back as they are now.
    """
    saved = {name: (buffer, _Kept(buffer)) for name, buffer in model.named_buffers()}

    def put_back() -> None:
        for name, present in list(model.named_buffers()):
            if name not in saved:
                continue
            buffer, kept = saved[name]
            if present is not buffer:  # the forward put another tensor in its place
                owner, _, key = name.rpartition(".")
                setattr(model.get_submodule(owner), key, buffer)
            kept.restore(buffer)

    return put_back


@contextmanager
def frozen_buffers(model: nn.Module) -> Iterator[None]:
    """Put back every buffer (running statistics of batch norm) at the end of the block.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    put_back = remembered_buffers(model)
    try:
        yield
    finally:
        put_back()


class _Kept:
    """What a buffer holds, and a way back to it that graphs made before do not notice.

    They may hold the buffer for their backward, and find in it at the end what it held; but every write counts up the
    version by which they would tell.  Writing to ``data`` does not.

    Args:
        buffer: The buffer.
    """

    def __init__(self, buffer: torch.Tensor) -> None:
        self._strided = buffer.layout == torch.strided
        self._size, self._stride = buffer.shape, buffer.stride() if self._strided else ()
        self._version = 0 if self._strided else buffer._version
        self._values = (_memory(buffer) if self._strided else buffer.detach()).clone()

    def restore(self, buffer: torch.Tensor) -> None:
        """Put it back.

        Args:
            buffer: The buffer.
        """
        if self._strided:
            if buffer.shape != self._size:  # observers of a quantiser give theirs a size at the first forward
                with torch.no_grad():
                    buffer.resize_(self._size).as_strided_(self._size, self._stride)
            _memory(buffer).copy_(self._values)
        elif buffer._version != self._version:  # the data of a sparse tensor is a tensor of its own
            with torch.no_grad():
                buffer.copy_(self._values)


def _memory(buffer: torch.Tensor) -> torch.Tensor:
    """View a buffer's data without the dimensions along which it was expanded, which cannot be written to."""
    view = buffer.data
    for dim, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        if stride == 0 and size > 1:
            view = view.narrow(dim, 0, 1)
    return view


def refuse_inference_mode(what: str) -> None:
    """Refuse to differentiate where torch records nothing, and gives derivatives of zero without a word.

    Args:
        what: What is to be computed.

    Raises:
        RuntimeError: It runs under `torch.inference_mode`.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{what} differentiates the model, which torch.inference_mode() does not allow: call it outside, on "
            "tensors that were made outside. Under torch.no_grad() it works."
        )


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
