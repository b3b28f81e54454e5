"""The deep autoencoder of Hinton and Salakhutdinov (2006), with rectified or logistic units."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from kronfac.experiments.models.initialise import initialise, initialise_sparsely, mark_linear


def autoencoder(widths: Sequence[int]) -> nn.Sequential:
    """Build an encoder with the given widths and its mirror image.

    Args:
        widths: Units per layer from the pixels to the code, such as ``(784, 1000, 500, 250, 30)``. Rectified units
            everywhere but at the code, which is linear, and at the output, which gives the logits of the pixels.

    Returns:
        A network from images ``[N, widths[0]]`` to logits of the same shape.
    """
    sizes = [*widths, *reversed(widths[:-1])]
    code = len(widths) - 2
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise(sizes)):
        layer = nn.Linear(inputs, outputs)
        if index in {code, len(sizes) - 2}:
            layers.append(mark_linear(layer))
        else:
            layers += [layer, nn.ReLU()]
    return initialise(nn.Sequential(*layers))  # type: ignore[return-value]


def logistic_autoencoder(widths: Sequence[int]) -> nn.Sequential:
    """Build the network of Martens and Grosse (2015): logistic units, a linear code, and their sparse initialisation.

    Args:
        widths: Units per layer from the pixels to the code.

    Returns:
        A network from images ``[N, widths[0]]`` to logits of the same shape.
    """
    sizes = [*widths, *reversed(widths[:-1])]
    code = len(widths) - 2
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(inputs, outputs))
        if index not in {code, len(sizes) - 2}:
            layers.append(nn.Sigmoid())
    return initialise_sparsely(nn.Sequential(*layers))  # type: ignore[return-value]
