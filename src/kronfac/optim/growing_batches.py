"""Mini-batches that grow, as the noise of the gradient comes to matter (Martens & Grosse 2015, section 13)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

from kronfac.optim.options import at_least


class GrowingBatches(Sampler[list[int]]):
    """Batches of ``m_k = min(m₁ e^{(k−1)/b}, |S|)`` examples, with ``b`` such that the last step sees all of them.

    Examples are drawn without replacement from one permutation after another, so that each is seen before any is seen
    twice; a batch of all examples is a permutation.  Use it as ``DataLoader(data, batch_sampler=GrowingBatches(...))``,
    or iterate over it and index tensors: iteration goes on after :meth:`load_state_dict`, and ends after ``steps``.

    Args:
        size: Number of examples ``|S|``.
        steps: Number of batches.
        start: Size ``m₁`` of the first batch.
        full_at: Step ``k`` at which a batch first holds all examples; 500 in the paper.
        seed: Of the permutations.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(self, size: int, steps: int, *, start: int = 1000, full_at: int = 500, seed: int = 0) -> None:
        for name, value, low in (("size", size, 1), ("steps", steps, 1), ("start", start, 1), ("full_at", full_at, 2)):
            at_least(name, value, low, integer=True)
        self.size, self.steps, self.start, self.full_at = size, steps, min(start, size), full_at
        self._generator = torch.Generator().manual_seed(seed)
        self._step, self._left = 0, torch.empty(0, dtype=torch.long)

    def batch_size(self, step: int) -> int:
        """Size of a batch.

        Args:
            step: Its number ``k``, from 1.

        Returns:
            ``m_k``.
        """
        growth = math.log(self.size / self.start) / (self.full_at - 1)
        return min(round(self.start * math.exp((step - 1) * growth)), self.size) if step < self.full_at else self.size

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches that are left."""
        while self._step < self.steps:
            wanted = self.batch_size(self._step + 1)
            taken = [self._left[:wanted]]
            while (missing := wanted - sum(map(len, taken))) > 0:
                order = torch.randperm(self.size, generator=self._generator)
                # What is in the batch already waits until the end of this permutation.
                again = torch.isin(order, torch.cat(taken))
                self._left = torch.cat((order[~again], order[again]))
                taken.append(self._left[:missing])
            self._left = self._left[len(taken[-1]) :]
            self._step += 1
            yield torch.cat(taken).tolist()

    def state_dict(self) -> dict[str, Any]:
        """Where it is, for resuming."""
        return {"step": self._step, "left": self._left.clone(), "generator": self._generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Args:
            state_dict: From a sampler with the same arguments.
        """
        self._step, self._left = int(state_dict["step"]), state_dict["left"].clone()
        self._generator.set_state(state_dict["generator"])
