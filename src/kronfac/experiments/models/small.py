"""Small classifiers for images of any size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from kronfac.experiments.models.initialise import initialise, mark_linear


def perceptron(widths: Sequence[int], norm: bool = False) -> nn.Sequential:
    """Build a fully-connected classifier with rectified hidden units.

    Args:
        widths: Units per layer, from the inputs to the classes.
        norm: Whether batch norm stands before each rectification.

    Returns:
        A network from ``[N, widths[0]]`` to logits ``[N, widths[-1]]``.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths[:-1]):
        layers += [nn.Linear(inputs, outputs), *([nn.BatchNorm1d(outputs)] if norm else []), nn.ReLU()]
    layers.append(mark_linear(nn.Linear(widths[-2], widths[-1])))
    return initialise(nn.Sequential(*layers))  # type: ignore[return-value]


def small_convolutional(maps: tuple[int, int] = (16, 32), classes: int = 10, size: int = 8) -> nn.Sequential:
    """Build a classifier of small grey images: two 3x3 convolutions with pooling, and one fully-connected layer.

    Args:
        maps: Maps of the two convolutions.
        classes: Number of outputs.
        size: Height and width of the images.

    Returns:
        A network from ``[N, 1, size, size]`` to logits ``[N, classes]``.
    """
    first, second = maps
    return initialise(  # type: ignore[return-value]
        nn.Sequential(
            nn.Conv2d(1, first, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            mark_linear(nn.Linear(second * (size // 2 // 2) ** 2, classes)),
        )
    )


def plain_convolutional(kernel: int = 3, maps: Sequence[int] = (32, 64, 64), classes: int = 10) -> nn.Sequential:
    """Build a classifier whose convolutions all keep the size of the image: its mean is taken before the last layer.

    Args:
        kernel: Height and width of every kernel, an odd number.
        maps: Maps of the convolutions.
        classes: Number of outputs.

    Returns:
        A network from ``[N, 3, H, W]`` to logits ``[N, classes]``.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((3, *maps)):
        layers += [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.ReLU()]
    last = mark_linear(nn.Linear(maps[-1], classes))
    return initialise(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last))  # type: ignore[return-value]
