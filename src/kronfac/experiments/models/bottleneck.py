"""Residual networks of bottlenecks for large images (He et al. 2016, table 1): ResNet-50."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from kronfac.experiments.models.initialise import initialise, mark_linear

#: Maps going out of a bottleneck over those within.
EXPANSION = 4


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution beside a shortcut, which is a 1x1 convolution where shapes differ (option B).

    The stride is that of the 3x3 convolution, "version 1.5": the published network has it on the first one, which
    throws three quarters of its input away.

    Args:
        inputs: Maps coming in.
        width: Maps within; four times as many go out.
        stride: Stride of the 3x3 convolution and of the shortcut.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: ``[N, inputs, H, W]``.

        Returns:
            ``[N, 4 * width, H / stride, W / stride]``.
        """
        out = functional.relu(self.norm1(self.conv1(x)))
        out = functional.relu(self.norm2(self.conv2(out)))
        return functional.relu(self.norm3(self.conv3(out)) + self.shortcut(x))


class BottleneckNet(nn.Module):
    """A stem that quarters the image, four stages of bottlenecks, and a classifier of the maps' means.

    Args:
        blocks: Bottlenecks in each stage.
        width: Maps of the stem and within the first stage's bottlenecks; they double from stage to stage.
        classes: Number of outputs.
    """

    def __init__(self, blocks: tuple[int, int, int, int], width: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(blocks):
            for index in range(count):
                stages.append(Bottleneck(inputs, width << stage, 2 if stage and index == 0 else 1))
                inputs = EXPANSION * (width << stage)
        self.stages = nn.Sequential(*stages)
        self.head = mark_linear(nn.Linear(inputs, classes))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: ``[N, 3, H, W]``, with sides that 32 divides.

        Returns:
            Logits, ``[N, classes]``.
        """
        out = functional.relu(self.norm(self.conv(x)))
        out = self.stages(functional.max_pool2d(out, 3, 2, padding=1))
        return self.head(out.mean((2, 3)))


def resnet50(classes: int = 1000, blocks: tuple[int, int, int, int] = (3, 4, 6, 3), width: int = 64) -> BottleneckNet:
    """Build ResNet-50: 25,557,032 parameters as published, for images of 224 by 224.

    Args:
        classes: Number of outputs.
        blocks: Bottlenecks in each stage.
        width: Maps of the stem.

    Returns:
        A network from ``[N, 3, H, W]`` to logits ``[N, classes]``.
    """
    return BottleneckNet(blocks, width, classes)
