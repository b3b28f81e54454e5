"""The CIFAR-10 network of Grosse and Martens (2016): cuda-convnet's of 18 % error, without response normalisation."""

from __future__ import annotations

from torch import nn

from kronfac.experiments.models.initialise import initialise, mark_linear


def kfc_network(classes: int = 10, batch_norm: bool = False, pooling: str = "published") -> nn.Sequential:
    """Build the network: three 5x5 convolutions (32, 32, 64 maps), each with 3x3 pooling of stride 2, and one layer.

    The paper's, and cuda-convnet's, normalise responses after the first two poolings; here nothing does, or batch norm.

    Maximum pooling after the first convolution, average pooling after the others; the maps are 16, 8 and 4 pixels
    wide because the pooling windows may overhang (``ceil_mode``), as cuda-convnet's do.

    Args:
        classes: Number of outputs.
        batch_norm: Whether each convolution's bias is replaced by batch normalisation.
        pooling: ``"published"`` as above, or ``"max"`` or ``"average"`` everywhere, to see what pooling does to the
            derivatives (section 5.1).

    Returns:
        A network from ``[N, 3, 32, 32]`` to logits ``[N, classes]``.

    Raises:
        ValueError: If ``pooling`` is none of these.
    """
    if pooling not in ("published", "max", "average"):
        raise ValueError(f"pooling={pooling!r} is unknown; choose 'published', 'max' or 'average'.")

    def pool(published: str) -> nn.Module:
        kind = nn.MaxPool2d if (published if pooling == "published" else pooling) == "max" else nn.AvgPool2d
        return kind(3, 2, ceil_mode=True)

    def convolution(inputs: int, outputs: int) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, outputs, 5, padding=2, bias=not batch_norm)
        return [layer, nn.BatchNorm2d(outputs)] if batch_norm else [layer]

    return initialise(  # type: ignore[return-value]
        nn.Sequential(
            *convolution(3, 32),
            pool("max"),
            nn.ReLU(),
            *convolution(32, 32),
            nn.ReLU(),
            pool("average"),
            *convolution(32, 64),
            nn.ReLU(),
            pool("average"),
            nn.Flatten(),
            mark_linear(nn.Linear(64 * 4 * 4, classes)),
        )
    )
