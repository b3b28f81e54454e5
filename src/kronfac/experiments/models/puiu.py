"""The MNIST network of Puiu (2022), supplement 7.2."""

from __future__ import annotations

from torch import nn

from kronfac.experiments.models.pooling import MaxPool2x2


def puiu_network(dropout: float = 0.5) -> nn.Sequential:
    """Build the network of 4712 parameters: 5x5 convolutions with 5 and 7 filters, and layers of 112, 30 and 10 units.

    The supplement prints seven filters, then five; only five, then seven, give its 112 flattened units and its number
    of parameters. Maxima are taken before the ReLU, which commutes with them. Weights are PyTorch's own: the paper says
    nothing of them, nor of where "the very last layer" drops, and at what rate: here its inputs, half of them.

    Args:
        dropout: Rate of the dropout.

    Returns:
        A network from ``[N, 1, 28, 28]`` to logits ``[N, 10]``.
    """
    return nn.Sequential(
        nn.Conv2d(1, 5, 5),
        MaxPool2x2(),
        nn.ReLU(),
        nn.Conv2d(5, 7, 5),
        MaxPool2x2(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(112, 30),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(30, 10),
    )
