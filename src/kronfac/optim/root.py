"""The module that a training loop calls: what wraps it, and whether it is still the same."""

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


def identities(model: nn.Module) -> list[tuple[int, object]]:
    """Tell modules and parameters from others, by a walk that is cheap enough for every step.

    Args:
        model: The model.

    Returns:
        Identities of all modules and parameters, and formats of these.
    """
    found: dict[int, object] = {id(model): None}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        for parameter in module._parameters.values():
            if parameter is not None:
                found[id(parameter)] = (parameter.dtype, parameter.device)
        for part in module._modules.values():
            if part is not None and id(part) not in found:
                found[id(part)] = None
                waiting.append(part)
    return list(found.items())
