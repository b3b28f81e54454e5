"""What a loaded dataset is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """One part of a dataset.

    Attributes:
        images: uint8, ``[N, C, H, W]``.
        labels: int64, ``[N]``.
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """Images with class labels, kept as bytes (a quarter of the memory) and turned into floats on demand.

    Attributes:
        name: The name it was asked for by.
        train: The training split.
        test: The test split.
        classes: Number of classes.
        levels: The byte that means full intensity: 255, or 16 for the digits.
    """

    name: str
    train: Split
    test: Split
    classes: int
    levels: int = 255

    def pixels(self, split: Split) -> Tensor:
        """Give the images of a split as floats.

        Args:
            split: ``train`` or ``test`` of this dataset.

        Returns:
            float32 in [0, 1], ``[N, C, H, W]``.
        """
        return split.images.to(torch.float32).div_(self.levels)

    def standardised(self) -> tuple[Tensor, Tensor]:
        """Give both splits with each channel shifted and scaled by the training split's mean and deviation.

        Returns:
            Training and test images, float32, ``[N, C, H, W]``.
        """
        train, test = self.pixels(self.train), self.pixels(self.test)
        # In float64: the float32 sum over fifty million pixels would lose digits, differently on every thread count.
        channels = train.transpose(0, 1).reshape(train.shape[1], -1).to(torch.float64)
        mean = channels.mean(1).to(torch.float32).view(1, -1, 1, 1)
        deviation = channels.std(1).to(torch.float32).view(1, -1, 1, 1)
        return train.sub_(mean).div_(deviation), test.sub_(mean).div_(deviation)
