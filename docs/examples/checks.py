"""Prints what `coverage` and `verify` say of three models into the text files beside this one.

    python docs/examples/checks.py

Weights and inputs are random with fixed seeds, so that no data set is needed and the output can be repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import kronfac as kf
from kronfac.experiments.models.resnet import ResNet

FOLDER = Path(__file__).parent
#: Verifications of each model, and the form of weight sharing they are made with.
SHARING = {
    "resnet20": {"verify": "expand", "verify-reduce": "reduce"},
    "encoder": {"verify": "expand"},
    "unsupported": {"verify": "expand"},
}


class Attention(nn.Module):
    """Self-attention whose projections are layers of their own, so that each has its factors."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Attend, ``[B, S, width]`` to ``[B, S, width]``."""
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """One block of a transformer encoder over tokens, and a class for each token."""

    def __init__(self, words: int = 30, width: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads=4)
        self.norm2, self.wide, self.narrow = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Classify tokens, ``[B, S]`` to logits ``[B, classes, S]`` as ``F.cross_entropy`` takes them."""
        x = self.embedding(tokens)
        x = x + self.attention(self.norm1(x))
        x = x + self.narrow(nn.functional.gelu(self.wide(self.norm2(x))))
        return self.head(x).transpose(1, 2)


def models() -> Iterator[tuple[str, nn.Module, kf.Likelihood, tuple[Tensor, Tensor]]]:
    """Name, model, loss and probe batch of each example, in float64 and eval mode."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    yield "resnet20", ResNet(), kf.Categorical(), (images, torch.randint(10, (2,)))
    tokens, targets = torch.randint(30, (4, 6)), torch.randint(5, (4, 6))
    targets[0, 4:] = -100  # padding, which the loss ignores
    yield "encoder", Encoder(), kf.Categorical(ignore_index=-100), (tokens, targets)
    rows = torch.randn(8, 10, dtype=torch.float64)
    unsupported = nn.Sequential(nn.Linear(10, 8), nn.PReLU(), nn.Linear(8, 3))
    yield "unsupported", unsupported, kf.Categorical(), (rows, torch.randint(3, (8,)))


def main() -> None:
    """Write a file for each model and report."""
    for name, model, likelihood, batch in models():
        model = model.double().eval()
        reports: dict[str, object] = {"coverage": kf.coverage(model)}
        for what, sharing in SHARING[name].items():
            report = kf.verify(model, likelihood, batch, source="exact", sharing=sharing)
            report.raise_if(scale=1e-8)
            reports[what] = report
        for what, report in reports.items():
            text = "\n".join(line.rstrip() for line in str(report).splitlines())
            (FOLDER / f"{name}-{what}.txt").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
