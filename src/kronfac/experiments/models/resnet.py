"""Residual networks for 32 by 32 images (He et al. 2016, section 4.2)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from kronfac.experiments.models.initialise import initialise, mark_linear


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (option A: subsample, pad with zero maps).

    Args:
        inputs: Maps coming in.
        outputs: Maps going out.
        stride: Stride of the first convolution and of the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: ``[N, inputs, H, W]``.

        Returns:
            ``[N, outputs, H / stride, W / stride]``.
        """
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.padding:
            shortcut = functional.pad(shortcut, (0, 0, 0, 0, self.padding // 2, self.padding - self.padding // 2))
        out = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(out)) + shortcut)


class ResNet(nn.Module):
    """A residual network of ``6 * blocks + 2`` layers: ResNet-20 for three blocks per stage.

    Args:
        blocks: Residual blocks in each of the three stages.
        classes: Number of outputs.
        maps: Maps of the three stages.
    """

    def __init__(self, blocks: int = 3, classes: int = 10, maps: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, maps[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(maps[0])
        stages: list[nn.Module] = []
        inputs = maps[0]
        for outputs, stride in zip(maps, (1, 2, 2), strict=True):
            for index in range(blocks):
                stages.append(BasicBlock(inputs, outputs, stride if index == 0 else 1))
                inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.head = mark_linear(nn.Linear(maps[-1], classes))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: ``[N, 3, 32, 32]``.

        Returns:
            Logits, ``[N, classes]``.
        """
        out = self.stages(functional.relu(self.norm(self.conv(x))))
        return self.head(out.mean((2, 3)))
