"""VGG-16 for 32 by 32 images (Simonyan & Zisserman 2014, configuration D, with one fully-connected layer)."""

from __future__ import annotations

from torch import nn

from kronfac.experiments.models.initialise import initialise, mark_linear

#: Maps of the convolutions of each stage; maximum pooling by two follows each stage.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def vgg16(classes: int = 10, batch_norm: bool = False, stages: tuple[tuple[int, ...], ...] = STAGES) -> nn.Sequential:
    """Build the network: thirteen 3x3 convolutions, five poolings to one pixel, and one layer.

    Args:
        classes: Number of outputs.
        batch_norm: Whether each convolution's bias is replaced by batch normalisation.
        stages: Maps of the convolutions of each of five stages.

    Returns:
        A network from ``[N, 3, 32, 32]`` to logits ``[N, classes]``.
    """
    layers: list[nn.Module] = []
    maps = 3
    for stage in stages:
        for outputs in stage:
            layers.append(nn.Conv2d(maps, outputs, 3, padding=1, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm2d(outputs))
            layers.append(nn.ReLU())
            maps = outputs
        layers.append(nn.MaxPool2d(2))
    network = nn.Sequential(*layers, nn.Flatten(), mark_linear(nn.Linear(maps, classes)))
    return initialise(network)  # type: ignore[return-value]
