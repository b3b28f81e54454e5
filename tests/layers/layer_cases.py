"""One case for every kind of layer: the module, and an input of at least two examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from tests.exactness_helpers import double, draw
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    indices: int = 0  # the input holds indices below this number

    def module(self) -> nn.Module:
        module = double(self.make(), seed=1)
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.copy_(draw(*module.running_mean.shape, seed=8))
            module.running_var.copy_(draw(*module.running_var.shape, seed=9).exp())
            module.eval()
        return module

    def input(self, seed: int = 2) -> Tensor:
        if self.indices:
            return torch.randint(self.indices, self.shape, generator=torch.Generator().manual_seed(seed))
        return draw(*self.shape, seed=seed)


class Scaled(nn.Linear):
    """A subclass inherits its parent's adapter."""


CASES: dict[str, Case] = {
    "linear": Case(lambda: nn.Linear(3, 4), (5, 3)),
    "linear, positions": Case(lambda: nn.Linear(3, 2), (4, 2, 3, 3)),
    "linear, no bias": Case(lambda: nn.Linear(3, 4, bias=False), (5, 3)),
    "linear, subclass": Case(lambda: Scaled(2, 3), (4, 2)),
    "conv1d": Case(lambda: nn.Conv1d(2, 3, 3, padding=1), (3, 2, 7)),
    "conv1d, same, reflect": Case(lambda: nn.Conv1d(2, 3, 4, padding="same", padding_mode="reflect"), (2, 2, 7)),
    "conv2d": Case(lambda: nn.Conv2d(2, 3, 3, padding=1), (3, 2, 5, 4)),
    "conv2d, valid": Case(lambda: nn.Conv2d(2, 3, (1, 2), padding="valid"), (2, 2, 3, 4)),
    "conv2d, 1x1": Case(lambda: nn.Conv2d(2, 3, 1), (3, 2, 3, 3)),
    "conv2d, no bias, strided": Case(lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 3), bias=False), (2, 2, 7, 8)),
    "conv2d, groups, dilated": Case(lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2), (2, 4, 6, 5)),
    "conv2d, depthwise, circular": Case(
        lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular", groups=3), (2, 3, 4, 5)
    ),
    "conv2d, replicate": Case(lambda: nn.Conv2d(2, 2, 3, stride=2, padding=2, padding_mode="replicate"), (2, 2, 5, 5)),
    "conv3d": Case(lambda: nn.Conv3d(2, 2, 2, stride=(1, 2, 1), padding=1), (2, 2, 3, 4, 3)),
    "conv3d, groups": Case(lambda: nn.Conv3d(2, 4, 2, groups=2, bias=False), (2, 2, 3, 3, 3)),
    "conv transpose 1d": Case(lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 2, 4)),
    "conv transpose 2d, groups": Case(
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), dilation=(2, 1), groups=2), (2, 4, 3, 3)
    ),
    "conv transpose 2d, unit stride": Case(lambda: nn.ConvTranspose2d(2, 3, 3, padding=1), (2, 2, 4, 3)),
    "conv transpose 3d, no bias": Case(lambda: nn.ConvTranspose3d(1, 2, 2, stride=2, bias=False), (2, 1, 2, 2, 2)),
    "embedding": Case(lambda: nn.Embedding(5, 3), (4, 6), indices=5),
    "embedding, padding": Case(lambda: nn.Embedding(4, 3, padding_idx=1), (3, 7), indices=4),
    "batch norm": Case(lambda: nn.BatchNorm1d(3, eps=0.1), (4, 3)),
    "batch norm 2d": Case(lambda: nn.BatchNorm2d(3, eps=0.1), (4, 3, 2, 2)),
    "layer norm": Case(lambda: nn.LayerNorm(4, eps=0.1), (3, 5, 4)),
    "layer norm, two dimensions": Case(lambda: nn.LayerNorm((2, 3), eps=0.1), (3, 2, 3)),
    "layer norm, no bias": Case(lambda: nn.LayerNorm(4, bias=False), (3, 4)),
    "group norm": Case(lambda: nn.GroupNorm(2, 4, eps=0.1), (3, 4, 3)),
    "instance norm": Case(lambda: nn.InstanceNorm2d(3, eps=0.1, affine=True), (2, 3, 3, 2)),
    "instance norm, running": Case(
        lambda: nn.InstanceNorm1d(3, eps=0.1, affine=True, track_running_stats=True), (2, 3, 4)
    ),
    "rms norm, default": Case(lambda: nn.RMSNorm(3), (3, 3)),
    "rms norm": Case(lambda: nn.RMSNorm(4, eps=0.1), (3, 2, 4)),
}
NORMS = [name for name in CASES if "norm" in name]
#: Layers whose input is a matrix of rows that :meth:`LayerAdapter.expand` gives, and nothing else.
PLAIN = [name for name in CASES if not CASES[name].indices]


def variants(names: Iterable[str]) -> list[tuple[str, str]]:
    """Each case as it is, and with its weight or its bias frozen where both are there."""
    found = []
    for name in names:
        both = len(list(CASES[name].module().parameters())) == 2
        found += [(name, frozen) for frozen in (("", "weight", "bias") if both else ("",))]
    return found
