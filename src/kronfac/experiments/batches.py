"""Mini-batches from tensors in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from kronfac.experiments.augmentation import augmented
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.problems.base import Data

# Spreads the seeds of runs apart, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
_SEED_STRIDE = 1_000_003
# Beyond every seed of an order of examples, so that crops do not repeat one.
_CROPS = 1 << 62


class Batches:
    """The batch of every step, as a function of the seed and the step alone: resuming needs no state.

    Each epoch is a new permutation of the training set; the examples that do not fill a last batch wait for another
    epoch.

    Args:
        data: The problem's data.
        size: Examples per batch.
        seed: The run's seed.
        crop_padding: Zeros around an image, of which it is a random crop; 0 for none.
        mirror: Whether half of the images are mirrored.

    Raises:
        ExperimentError: If a batch is larger than the training set.
    """

    def __init__(self, data: Data, size: int, seed: int, crop_padding: int = 0, mirror: bool = False) -> None:
        self._inputs, self._targets = data.train_inputs, data.train_targets
        if size > len(self._inputs):
            raise ExperimentError(f"batch_size must be at most the {len(self._inputs)} training examples, got {size}")
        self.size, self._seed = size, seed
        self._crop_padding, self._mirror = crop_padding, mirror
        self.per_epoch = len(self._inputs) // size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Give the batch of a step.

        Args:
            step: Steps done before it.

        Returns:
            Inputs and targets.
        """
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * _SEED_STRIDE + epoch)
            self._order = torch.randperm(len(self._inputs), generator=generator).to(self._inputs.device)
            self._epoch = epoch
        rows = self._order[index * self.size : (index + 1) * self.size]
        inputs = self._inputs[rows]
        if self._crop_padding or self._mirror:
            generator = torch.Generator().manual_seed(self._seed * _SEED_STRIDE + step + _CROPS)
            inputs = augmented(inputs, self._crop_padding, self._mirror, generator)
        return inputs, self._targets[rows]
