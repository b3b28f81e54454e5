"""A small model with every kind of block, and layouts that depend on no adapter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tests.blocks.block_cases import random_psd, random_tensor
from torch import Tensor, nn

from kronfac.blocks import Block, Dense, Diagonal, DiagonalKronecker, Kronecker
from kronfac.curvature import BlockDiagonal


class MatrixLayout:
    """``[W b]`` of a linear layer, a grouped one, or a weight alone."""

    def __init__(self, layer: str, shape: tuple[int, ...], bias: bool) -> None:
        self.layer, self.shape, self.bias = layer, shape, bias
        self.parameter_names = (f"{layer}.weight", f"{layer}.bias")[: 1 + bias]

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        weight = tensors[f"{self.layer}.weight"].reshape(*self.shape[:-1], self.shape[-1] - self.bias)
        if not self.bias:
            return weight
        return torch.cat([weight, tensors[f"{self.layer}.bias"].reshape(*self.shape[:-1], 1)], -1)

    def unpack(self, matrix: Tensor) -> dict[str, Tensor]:
        columns = self.shape[-1] - self.bias
        out = {f"{self.layer}.weight": matrix[..., :columns].reshape(-1, columns)}
        if self.bias:
            out[f"{self.layer}.bias"] = matrix[..., -1].flatten()
        return out


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 3))
        self.bias = nn.Parameter(torch.zeros(4))


def make_model() -> nn.Module:
    return nn.ModuleDict(
        {
            "first": nn.Linear(3, 2),
            "uncovered": nn.Linear(2, 2),
            "grouped": Grouped(),
            "head": nn.Linear(2, 3, bias=False),
            "last": nn.Linear(1, 2),
        }
    ).double()


def make_curvature(model: nn.Module) -> BlockDiagonal:
    """One block of each kind; their order differs from that of the parameters, and one layer has none."""
    blocks: dict[str, Block] = {
        "head": DiagonalKronecker(random_tensor(2, seed=2).abs(), random_psd(3, 3, seed=3)),
        "first": Kronecker(random_psd(4, 4, seed=0), random_psd(2, 2, seed=1)),
        "last": Dense(random_psd(4, 4, seed=4), (2, 2)),
        "grouped": Diagonal(random_tensor(2, 2, 4, seed=5).abs()),
    }
    layouts = {name: MatrixLayout(name, tuple(block.shape), name != "head") for name, block in blocks.items()}
    return BlockDiagonal(blocks, layouts, [name for name, _ in model.named_parameters()], {"sharing": "expand"})
