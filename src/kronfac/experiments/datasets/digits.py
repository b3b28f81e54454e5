"""The 8 by 8 digits that ship inside scikit-learn: the offline default."""

from __future__ import annotations

import torch

from kronfac.experiments.datasets.base import Dataset, Split
from kronfac.experiments.errors import need

_TRAIN = 1500


def load_digits() -> Dataset:
    """Load the 1,797 digits, 1,500 for training and 297 for testing.

    The file is ordered by writer, so the split is a fixed shuffle of it, the same in every run.

    Returns:
        The dataset, with pixels from 0 to 16.
    """
    bunch = need("sklearn.datasets", "data").load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    first, second = order[:_TRAIN], order[_TRAIN:]
    return Dataset(
        name="digits",
        train=Split(images[first], labels[first]),
        test=Split(images[second], labels[second]),
        classes=10,
        levels=16,
    )
