"""Coverage and verification of three models, as the documentation's page on trust prints them.

Run with ``--write`` to renew the texts beside this file; without, they are printed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import kronfac as kf
from kronfac.experiments.models import ResNet

FOLDER = Path(__file__).parent


class Encoder(nn.Module):
    """A small transformer encoder that classifies sequences of 40 tokens; 0 is padding.

    Args:
        width: Of the embedding.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, width, padding_idx=0)
        self.encoder = nn.TransformerEncoderLayer(width, nhead=2, dim_feedforward=32, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Classify.

        Args:
            x: Tokens, ``[N, T]``.

        Returns:
            Logits, ``[N, 4]``.
        """
        return self.head(self.norm(self.encoder(self.tokens(x))).mean(1))


class Unsupported(nn.Module):
    """A bilinear layer and a parameter of its own, for which there are no adapters, before a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.pair = nn.Bilinear(6, 6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Classify.

        Args:
            x: ``[N, 6]``.

        Returns:
            Logits, ``[N, 3]``.
        """
        return self.head(torch.tanh(self.pair(x * self.scale, x)))


def resnet() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Build ResNet-20 and a batch of 8 random images, which have set its running statistics.

    Returns:
        The model in train mode and the batch.
    """
    torch.manual_seed(0)
    model, images = ResNet(), torch.randn(8, 3, 32, 32)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of what it has seen
    model(images)
    return model, (images, torch.randint(10, (8,)))


def encoder() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Build the encoder and a batch of 8 random sequences.

    Returns:
        The model in eval mode (its dropout would be random) and the batch.
    """
    torch.manual_seed(0)
    return Encoder().eval(), (torch.randint(40, (8, 12)), torch.randint(4, (8,)))


def unsupported() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Build the model with a layer without adapter, and a batch of 8.

    Returns:
        The model and the batch.
    """
    torch.manual_seed(0)
    return Unsupported(), (torch.randn(8, 6), torch.randint(3, (8,)))


def verified(build: Callable[[], tuple[nn.Module, tuple[Tensor, Tensor]]], source: str) -> str:
    """Verify a model in eval mode and float64.

    Args:
        build: Makes model and batch.
        source: Of the cotangents.

    Returns:
        The report as text.
    """
    model, (x, y) = build()
    model, x = model.double().eval(), x.double() if x.is_floating_point() else x
    report = kf.verify(model, kf.Categorical(), (x, y), source=source)
    report.raise_if(scale=1e-8)
    return str(report)


def sharing() -> str:
    """Compare the two readings of weight sharing on ResNet-20's last convolution.

    Returns:
        A line each.
    """
    model, (x, y) = resnet()
    model.double().eval()
    lines = []
    for kind in ("expand", "reduce"):
        report = kf.verify(model, kf.Categorical(), (x.double(), y), source="exact", sharing=kind)
        (row,) = [row for row in report.rows if row.layer == "stages.8.conv2"]
        lines.append(f"sharing={kind}: cosine {row.cosine:.3f}, scale {row.scale:.3f}, error {row.error:.3f}")
    return "\n".join(lines)


#: Texts by the name of the file that the page includes.
EXAMPLES: dict[str, Callable[[], str]] = {
    "resnet20-coverage": lambda: str(kf.coverage(resnet()[0])),
    "resnet20-verify": lambda: verified(resnet, "sampled"),
    "resnet20-sharing": sharing,
    "encoder-coverage": lambda: str(kf.coverage(encoder()[0])),
    "encoder-verify": lambda: verified(encoder, "exact"),
    "unsupported-coverage": lambda: str(kf.coverage(unsupported()[0])),
    "unsupported-verify": lambda: verified(unsupported, "exact"),
}


def main() -> None:
    """Print all examples, or write them beside this file."""
    for name, example in EXAMPLES.items():
        if "--write" in sys.argv[1:]:
            (FOLDER / f"{name}.txt").write_text(example() + "\n", encoding="utf-8")
        else:
            print(f"# {name}\n\n{example()}\n")


if __name__ == "__main__":
    main()
