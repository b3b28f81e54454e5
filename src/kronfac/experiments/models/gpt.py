"""A decoder of text, normalisation first, in the shape of GPT-2 (Radford et al. 2019), of plain layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class DecoderLayer(nn.Module):
    """Causal self-attention and a perceptron, each after a layer norm and beside a shortcut.

    Args:
        width: Features of a token.
        heads: Heads of attention; they divide the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: ``[N, tokens, width]``.

        Returns:
            Of the same shape.
        """
        y = self.norm1(x)
        query, key, value = (
            project(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.query, self.key, self.value)
        )
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Embeddings of tokens and positions, decoder layers, a layer norm and a linear head.

    The head is not tied to the embedding of the tokens, as GPT-2's is: kronfac keeps one block for each parameter, and
    leaves a shared one without curvature.

    Args:
        vocabulary: Number of tokens.
        context: Longest sequence.
        width: Features of a token.
        layers: Number of decoder layers.
        heads: Heads of attention.
    """

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.layers = nn.Sequential(*(DecoderLayer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # What ends a shortcut's branch is scaled down, so that the sum over all layers is not.
                ends = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if ends else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict the next token at each position.

        Args:
            tokens: Indices, ``[N, tokens]``.

        Returns:
            Logits, ``[N, tokens, vocabulary]``.
        """
        # Positions are looked up for each example: kronfac takes a layer's first dimension to be the batch.
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.head(self.norm(self.layers(self.tokens(tokens) + self.positions(places))))


def gpt2(vocabulary: int = 50257, context: int = 1024, width: int = 768, layers: int = 12, heads: int = 12) -> GPT:
    """Build GPT-2 small with a head of its own: 163,037,184 parameters, 38,597,376 of them the head's.

    Args:
        vocabulary: Number of tokens.
        context: Longest sequence.
        width: Features of a token.
        layers: Number of decoder layers.
        heads: Heads of attention.

    Returns:
        A network from indices ``[N, tokens]`` to logits ``[N, tokens, vocabulary]``.
    """
    return GPT(vocabulary, context, width, layers, heads)
