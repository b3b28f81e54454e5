"""Averages of a network's iterates (Polyak averaging with exponential decay, as in Grosse and Martens 2016)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class IterateAverage:
    """An exponentially decaying, bias-corrected average of a network's parameters and floating-point buffers.

    After t updates the average is ``(1 - d) sum_s d^(t - s) x_s / (1 - d^t)``. The running statistics of batch
    normalisation are averaged with the weights they belong to.

    Args:
        model: The network.
        decay: The decay d, in [0, 1); 0 keeps the last iterate, at no cost.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay, self._count = model, decay, 0
        self._sums = {name: torch.zeros_like(tensor) for name, tensor in self._live().items()} if decay else {}

    def _live(self) -> dict[str, Tensor]:
        return {name: t for name, t in self._model.state_dict().items() if t.is_floating_point()}

    def update(self) -> None:
        """Take the current iterate in."""
        if not self._decay:
            return
        self._count += 1
        live = self._live()
        for name, total in self._sums.items():
            total.lerp_(live[name], 1.0 - self._decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Swap the average into the network for the duration of a block.

        Yields:
            Nothing; the iterate is back afterwards. Before the first update, and without decay, nothing is swapped.
        """
        if not self._decay or self._count == 0:
            yield
            return
        live = self._live()
        kept = {name: tensor.clone() for name, tensor in live.items()}
        correction = 1.0 - self._decay**self._count
        try:
            for name, total in self._sums.items():
                live[name].copy_(total / correction)
            yield
        finally:
            for name, tensor in kept.items():
                live[name].copy_(tensor)

    def state_dict(self) -> dict[str, object]:
        """Give what a checkpoint needs.

        Returns:
            The count and the sums.
        """
        return {"count": self._count, "sums": self._sums}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore what `state_dict` gave.

        Args:
            state: The count and the sums.

        Raises:
            ValueError: If the sums are those of another network.
        """
        count, sums = state["count"], state["sums"]
        if not isinstance(count, int) or not isinstance(sums, dict) or sums.keys() != self._sums.keys():
            raise ValueError("the averaged iterates belong to another network")
        self._count = count
        for name, total in self._sums.items():
            total.copy_(sums[name])
