"""Averages of a network's iterates (Polyak averaging, Grosse and Martens 2016, Algorithm 1; Botev et al. 2017, B.4)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class IterateAverage:
    """An exponentially decaying average of a network's parameters and floating-point buffers.

    The t-th iterate comes in with the weight ``max(1 - d, 1/t)``, (44) and (45) of Botev et al. and the ``average`` of
    `kronfac.optim`. The running statistics of batch normalisation are averaged with the weights they belong to.

    Args:
        model: The network.
        decay: The decay d, in [0, 1); 0 keeps the last iterate, at no cost.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay, self._count = model, decay, 0
        self._averages = {name: torch.zeros_like(tensor) for name, tensor in self._live().items()} if decay else {}

    def _live(self) -> dict[str, Tensor]:
        return {name: t for name, t in self._model.state_dict().items() if t.is_floating_point()}

    def update(self) -> None:
        """Take the current iterate in."""
        if not self._decay:
            return
        self._count += 1
        live = self._live()
        for name, average in self._averages.items():
            average.lerp_(live[name], max(1.0 - self._decay, 1.0 / self._count))

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
        try:
            for name, average in self._averages.items():
                live[name].copy_(average)
            yield
        finally:
            for name, tensor in kept.items():
                live[name].copy_(tensor)

    def state_dict(self) -> dict[str, object]:
        """Give what a checkpoint needs.

        Returns:
            The count and the averages.
        """
        return {"count": self._count, "averages": self._averages}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore what `state_dict` gave.

        Args:
            state: The count and the averages.

        Raises:
            ValueError: If they are those of another network.
        """
        count, averages = state["count"], state.get("averages")
        if not isinstance(count, int) or not isinstance(averages, dict) or averages.keys() != self._averages.keys():
            raise ValueError("the averaged iterates belong to another network")
        self._count = count
        for name, average in self._averages.items():
            average.copy_(averages[name])
