"""The module behind what wraps it, and forwards of it that ``torch.compile`` has no part in."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import nn

from kronfac.threads import ForAllThreads

_Function = TypeVar("_Function", bound=Callable[..., Any])


def is_compiled(model: nn.Module) -> bool:
    """Whether a module is what ``torch.compile`` returned.

    Args:
        model: The module.

    Returns:
        True if so.
    """
    # Whoever compiled it has imported the compiler, which takes seconds and is not worth it for the question.
    frame = sys.modules.get("torch._dynamo.eval_frame")
    return frame is not None and isinstance(model, frame.OptimizedModule)


def has_compiled_parts(model: nn.Module) -> bool:
    """Whether a module or a part of it is compiled, by ``torch.compile(part)`` or in place by ``part.compile()``.

    Args:
        model: The module.

    Returns:
        True if so.
    """
    return any(is_compiled(m) or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())


def outside_of_graphs(function: _Function) -> _Function:
    """Keep ``torch.compile`` of what calls a function from compiling the function as well, hundreds of small pieces.

    Args:
        function: The function.

    Returns:
        The same, at which graphs end.
    """
    disabled: list[Any] = []  # made at the first call: it imports the compiler

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            disabled.append(torch.compiler.disable(function, reason="kronfac's own work is no part of a graph."))
        return disabled[0](*args, **kwargs)

    return run  # type: ignore[return-value]


@contextmanager
def eagerly() -> Iterator[None]:
    """Run whatever is compiled as it is written within the block: compiled code hears no hook that came after it.

    Yields:
        Nothing.
    """
    with ExitStack() as block:
        if "torch._dynamo.eval_frame" in sys.modules:
            with suppress(RuntimeError):  # the block itself is being compiled
                block.enter_context(_EAGERLY())
        yield


# The compiler's stance is one for all threads.
_EAGERLY = ForAllThreads(lambda: torch.compiler.set_stance("force_eager"))


def eager_root(model: nn.Module) -> nn.Module:
    """Return the module behind ``torch.compile`` and data-parallel wrappers; it shares their parameters.

    Args:
        model: The module the training loop calls.

    Returns:
        The eager module.
    """
    while True:
        if is_compiled(model):
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


def heard_root(model: nn.Module) -> nn.Module:
    """Return the module whose hooks see the forwards of a training loop: that within `DistributedDataParallel`.

    What that returns went through a function of its own, whose backward starts the exchange of gradients
    (``static_graph=True``); and what it takes may lie on another device.

    Args:
        model: The module the training loop calls.

    Returns:
        The module to watch.
    """
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def require_whole(model: nn.Module) -> None:
    """Refuse a model whose parameters are distributed over processes, of which each holds a part.

    Args:
        model: The model.

    Raises:
        ValueError: They are.
    """
    # Whoever distributed them has imported what did.
    tensors, fully = (sys.modules.get(f"torch.distributed.{name}") for name in ("tensor", "fsdp"))
    parts = [n for n, p in model.named_parameters() if tensors is not None and isinstance(p, tensors.DTensor)]
    if fully is not None:
        wrapped = (fully.FullyShardedDataParallel, *([fully.FSDPModule] if hasattr(fully, "FSDPModule") else []))
        parts += [n or "the model itself" for n, m in model.named_modules() if isinstance(m, wrapped)]
    if parts:
        raise ValueError(
            f"The parameters of {', '.join(parts[:3])}{' and others' if len(parts) > 3 else ''} are distributed over "
            "processes (fully_shard, FullyShardedDataParallel or tensor parallel), and factors need whole layers: use "
            "DistributedDataParallel, or a copy of the model with whole parameters."
        )
