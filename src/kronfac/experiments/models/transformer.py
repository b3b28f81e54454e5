"""A transformer encoder that reads an image row by row (Vaswani et al. 2017, normalisation first), of plain layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.experiments.models.initialise import initialise, mark_linear


class EncoderLayer(nn.Module):
    """Self-attention and a perceptron, each after a layer norm and beside a shortcut.

    Attention is made of four linear layers, so that each has its own curvature; `nn.MultiheadAttention` keeps its
    projections in one parameter, which no layer's forward sees.

    Args:
        width: Features of a token.
        heads: Heads of attention; they divide the width.
        hidden: Hidden units of the perceptron.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (mark_linear(nn.Linear(width, width)) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), mark_linear(nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: ``[N, tokens, width]``.

        Returns:
            Of the same shape.
        """
        y = self.norm1(x)
        query, key, value = (self._split(project(y)) for project in (self.query, self.key, self.value))
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        x = x + self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return x + self.down(functional.relu(self.up(self.norm2(x))))

    def _split(self, x: Tensor) -> Tensor:
        """``[N, heads, tokens, width / heads]``."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class RowTransformer(nn.Module):
    """Rows of a grey image as tokens, encoder layers, and a classifier of the tokens' mean.

    Positions are told by fixed sines and cosines, which have no parameters.

    Args:
        size: Height and width of the images.
        width: Features of a token, even.
        layers: Number of encoder layers.
        heads: Heads of attention.
        classes: Number of outputs.
    """

    def __init__(self, size: int, width: int = 16, layers: int = 2, heads: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.embed = mark_linear(nn.Linear(size, width))
        self.layers = nn.Sequential(*(EncoderLayer(width, heads, 2 * width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = mark_linear(nn.Linear(width, classes))
        angles = torch.arange(size).unsqueeze(1) * 10_000.0 ** (-torch.arange(0, width, 2) / width)
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], dim=1), persistent=False)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: ``[N, 1, size, size]``.

        Returns:
            Logits, ``[N, classes]``.
        """
        tokens = self.layers(self.embed(x.squeeze(1)) + self.positions)
        return self.head(self.norm(tokens).mean(1))
