"""Whether gradients came back from outputs, and whether they are gone although no step was taken."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor, nn

from kronfac.graph import differentiates_in
from kronfac.optim.options import values_of


class Returned:
    """Takes note when a derivative of watched outputs is one in a model's parameters.

    Args:
        model: The model.
        counts: A method that says whether the derivative under way is of the training; its owner is not kept alive.
    """

    def __init__(self, model: nn.Module, counts: Callable[[], bool]) -> None:
        self._model, self._counts, self._seen = model, weakref.WeakMethod(counts), False

    def reset(self) -> None:
        """Forget that gradients came back."""
        self._seen = False

    def watch(self, outputs: Tensor) -> None:
        """Watch derivatives of a forward's outputs.

        Args:
            outputs: The outputs.
        """
        me = weakref.ref(self)

        def note(_: Tensor) -> None:
            own = me()
            if own is None or own._seen or not ((counts := own._counts()) and counts()):
                return
            # One in the inputs alone, as of a gradient penalty, belongs to a loss that is still being formed.
            own._seen = differentiates_in(own._model.parameters())

        if outputs.requires_grad:
            outputs.register_hook(note)

    def gone(self) -> bool:
        """Whether gradients had come back, and are None or zero now.

        Returns:
            True if so.
        """
        return self._seen and not any(map(_holds, self._model.parameters()))


def _holds(parameter: Tensor) -> bool:
    return parameter.grad is not None and bool(values_of(parameter.grad).any())
