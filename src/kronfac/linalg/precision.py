"""In which format CUDA multiplies float32 matrices, for the time of a block.

PyTorch has an older and a newer setting of it, and refuses to read the older one, as its own products may do, where
only the newer one was changed.  So both are changed, and both come back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


@contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Let CUDA round the operands of float32 products to TF32 or not within the block, whatever is set outside of it.

    Args:
        allowed: Whether it may.

    Yields:
        Nothing.
    """
    settings = torch.backends.cuda.matmul
    new = settings.fp32_precision
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer one was changed alone: the older one says otherwise
        old = "highest" if new == "tf32" else "high"
    settings.allow_tf32 = allowed
    try:
        yield
    finally:
        if old == "medium":
            torch.set_float32_matmul_precision(old)
        else:
            settings.allow_tf32 = old != "highest"
        settings.fp32_precision = new


def full_products(device: torch.device) -> AbstractContextManager[None]:
    """Multiply float32 matrices on a device in float32 itself within the block.

    Args:
        device: Where they are.

    Returns:
        A context manager, which elsewhere than on CUDA touches nothing.
    """
    return tf32_products(False) if device.type == "cuda" else nullcontext()
