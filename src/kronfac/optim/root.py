"""Whether the module that a training loop calls is still the same."""

from __future__ import annotations

from torch import nn


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
