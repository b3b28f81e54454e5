"""The module that a training loop calls: whether it is still the same, and what a checkpoint repeats of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn

from kronfac.measuring import couples_examples, frozen_buffers


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


def kept_statistics(model: nn.Module) -> AbstractContextManager[None]:
    """Keep running statistics from what a checkpoint repeats of a forward while a derivative is computed.

    It calls the model's own modules, whatever buffers the forward was given.

    Args:
        model: The model.

    Returns:
        A context manager.
    """
    return frozen_buffers(model) if couples_examples(model) else nullcontext()


@contextmanager
def swapped(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let parameters have other values within the block, for what a checkpoint repeats of a forward with these.

    Args:
        model: The model.
        values: By parameter name; they are not copied.

    Yields:
        Nothing.
    """
    own = {parameter: parameter.data for name, parameter in model.named_parameters() if name in values}
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.data = values[name].detach()
    try:
        yield
    finally:
        for parameter, value in own.items():
            parameter.data = value
