"""The trial of whether rows are examples, of forwards that are gathered by a hook, by hand or before training."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from kronfac.estimator import Estimator
from kronfac.examples import check_examples, pick_of
from kronfac.optim.sub_batch import Arguments
from kronfac.tape import Tape


class Trial:
    """Refuses rows that are as many as the examples by chance, once they have passed no more.

    Args:
        estimator: Takes the statistics.
        pick: Picks the output tensor.
        measuring: A method that makes the context of the trial's own forwards; its owner is not kept alive.
    """

    def __init__(
        self,
        estimator: Estimator,
        pick: Callable[[Any], Tensor] | None,
        measuring: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._estimator, self._pick, self._measuring = estimator, pick, weakref.WeakMethod(measuring)
        self._passed = False
        self._seen: tuple[Arguments, Any] | None = None

    def __call__(
        self,
        tape: Tape,
        inputs: Any,
        outputs: Tensor,
        pick: Callable[[Any], Tensor] | None = None,
        targets: Any = None,
    ) -> None:
        """Try a forward.

        Args:
            tape: A recorded forward pass of the root module.
            inputs: Its arguments.
            outputs: Its outputs.
            pick: Picks them, where that is not the user's own way.
            targets: Targets, where they are known.
        """
        measuring = self._measuring()
        if measuring is not None and not self._passed and outputs.ndim:
            tape.meet(outputs)
            with measuring():
                check_examples(self._estimator, tape, inputs, outputs, pick or self._pick, targets)
            self._passed = True

    def note(self, arguments: Arguments, value: Any) -> None:
        """Keep a forward of the root, whose outputs are to be captured.

        Args:
            arguments: Its arguments.
            value: What it returned.
        """
        if not self._passed:
            self._seen = arguments, value

    def forget(self) -> None:
        """Let go of the forward that was kept."""
        self._seen = None

    def captured(self, tape: Tape, outputs: Tensor, targets: Any) -> None:
        """Try outputs that were captured, where the root's forward gave them as they are.

        Args:
            tape: The recorded layers.
            outputs: The outputs.
            targets: Targets, or None.
        """
        if self._seen is None:
            return
        arguments, value = self._seen
        first = self._pick or (lambda found: found)
        if (pick := pick_of(first(value), outputs)) is not None:
            self(tape, arguments, outputs, lambda found: pick(first(found)), targets)
