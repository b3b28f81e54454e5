"""Networks with batch norm after linear layers and convolutions, found in the graph or in the order of a sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def unsettled(model: nn.Module) -> nn.Module:
    """Double precision, and statistics, scales and shifts that are not those of a new batch norm."""
    torch.manual_seed(3)
    for module in model.double().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 3.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


class Residual(nn.Module):
    """Its batch norms are found in the graph alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(x)))
        return self.head((h + self.bn2(self.conv2(h))).mean((2, 3)))


class Branching(nn.Sequential):
    """Cannot be traced, so that the order of the sequence decides."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


CASES = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)), (7, 5)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 3)), (7, 2, 6)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 4, 2), nn.BatchNorm3d(4), nn.Flatten()), (7, 1, 3, 3, 3)),
    "residual": (Residual, (7, 2, 5, 5)),
    "untraceable": (lambda: Branching(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)), (7, 5)),
}
