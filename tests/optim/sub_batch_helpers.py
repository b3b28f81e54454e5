"""Models and comparisons of the tests of statistics of a part of the batch."""

from __future__ import annotations

from typing import Any

from tests.exactness_helpers import double
from torch import Tensor, nn

#: Of eight examples: three get a forward of their own, five are cut from the training forward.
APART, CUT = 3, 5


def normalised() -> nn.Module:
    return double(
        nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4),
            nn.Linear(4, 3),
        )
    )  # fmt: skip


def tensors(blocks: Any, scale: float = 1.0) -> dict[str, Tensor]:
    return {name: block.scale(scale).to_dense() for name, block in blocks.items()}
