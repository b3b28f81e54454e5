"""The module behind what wraps it."""

from __future__ import annotations

import sys

from torch import nn


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
