"""Curves through three random points: made here by the description of Hinton and Salakhutdinov (2006).

The files of their CURVES set are not public, so that figures on this one are comparable with each other but not with
published ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kronfac.experiments.datasets.base import Dataset, Split

TRAIN, TEST, SIDE = 20_000, 10_000, 28
#: Points along a curve, deviation of the pen in pixels, and curves drawn at once.
_POINTS, _PEN, _CHUNK = 64, 0.7, 2_000


def load_curves() -> Dataset:
    """Draw 20,000 training and 10,000 test images of 28 by 28 pixels, the same in every run.

    Returns:
        The dataset; there is one class.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.cat([_draw(_CHUNK, generator) for _ in range((TRAIN + TEST) // _CHUNK)])
    labels = torch.zeros(len(images), dtype=torch.int64)
    train = Split(images[:TRAIN], labels[:TRAIN])
    return Dataset(name="curves", train=train, test=Split(images[TRAIN:], labels[TRAIN:]), classes=1)


def _draw(count: int, generator: torch.Generator) -> Tensor:
    """Draw parabolas that pass through three random points at times 0, 1/2 and 1."""
    first, middle, last = (2.0 + (SIDE - 5) * torch.rand(3, count, 1, 2, generator=generator)).unbind()
    time = torch.linspace(0.0, 1.0, _POINTS).view(1, -1, 1)
    curve = (
        first * (1 - time) * (1 - 2 * time) + middle * 4 * time * (1 - time) + last * time * (2 * time - 1)
    )  # Lagrange's polynomials, [count, points, 2]
    pixels = torch.arange(SIDE, dtype=torch.float32)
    # A Gaussian pen is a product of its two axes; the darkest touch counts.
    across = torch.exp(-0.5 * ((curve[..., 0:1] - pixels) / _PEN) ** 2)
    down = torch.exp(-0.5 * ((curve[..., 1:2] - pixels) / _PEN) ** 2)
    ink = torch.zeros(count, SIDE, SIDE)
    for point in range(_POINTS):
        torch.maximum(ink, down[:, point].unsqueeze(2) * across[:, point].unsqueeze(1), out=ink)
    return ink.mul_(255).round_().to(torch.uint8).unsqueeze(1)
