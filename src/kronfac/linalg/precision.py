"""In which format float32 matrices are multiplied: CUDA's own, and what autocast makes of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def tf32_allowed() -> bool:
    """Whether CUDA may round the operands of float32 products to TF32.

    Returns:
        What PyTorch's newer setting says, in which its older one shows too; the older one cannot be read where the
        newer one alone was changed.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def without_autocast(method: Callable[P, T]) -> Callable[P, T]:
    """Keep autocast out of a function, whose products it would round to 16 bits.

    Args:
        method: The function.

    Returns:
        It, at the precision of its arguments.
    """

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with ExitStack() as stack:
            for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
                stack.enter_context(torch.autocast(kind, enabled=False))
            return method(*args, **kwargs)

    return run
