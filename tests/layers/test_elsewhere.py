"""Linear layers of other libraries are known by name; stand-ins have their documented interface."""

from __future__ import annotations

import pytest
import torch
from tests.exactness_helpers import double, draw
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.layers.elsewhere import TransposedLinear


class Conv1D(nn.Module):
    """``y = x W + b`` with a weight ``[nx, nf]``."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(draw(nx, nf)), nn.Parameter(draw(nf, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Graphs(nn.Module):
    """A linear layer with other names for its sizes."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(draw(out_channels, in_channels))
        self.bias = nn.Parameter(draw(out_channels, seed=1)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


Conv1D.__module__ = "transformers.pytorch_utils"
Graphs.__module__, Graphs.__qualname__ = "torch_geometric.nn.dense.linear", "Linear"


class Own(Conv1D):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def twins() -> tuple[nn.Module, nn.Module]:
    """A network of these layers, and that of torch's own."""
    model = nn.Sequential(Conv1D(5, 4), nn.Tanh(), Graphs(5, 6, bias=False), nn.Tanh(), Conv1D(3, 6)).double()
    twin = double(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)))
    with torch.no_grad():
        for layer, other in zip(model, twin, strict=True):
            if isinstance(layer, Conv1D):
                other.weight.copy_(layer.weight.T)
                other.bias.copy_(layer.bias)
            elif isinstance(layer, Graphs):
                other.weight.copy_(layer.weight)
    return model, twin


X, LABELS = draw(12, 4), torch.arange(12) % 3


@pytest.mark.parametrize("approximation", ["kfac", "ekfac", "dense", "diagonal"])
def test_blocks_are_those_of_torchs_linear_layers(approximation: str) -> None:
    options = {"approximation": approximation, "source": "exact"}
    found, wanted = (kf.estimate(m, kf.Categorical(), (X, LABELS), **options) for m in twins())
    for name, block in wanted.blocks.items():
        torch.testing.assert_close(found.blocks[name].to_dense(), block.to_dense(), rtol=1e-9, atol=1e-12)


def test_operator_and_oracle_agree_on_the_layout() -> None:
    model = nn.Sequential(Conv1D(3, 4)).double()
    found = kf.estimate(model, kf.Categorical(), (X, LABELS), approximation="dense", source="exact").to_dense()
    torch.testing.assert_close(found, kf.reference.ggn(model, kf.Categorical(), X), rtol=1e-9, atol=1e-12)
    kf.verify(model, kf.Categorical(), (X, LABELS)).raise_if(scale=1e-9)


def test_steps_are_those_of_torchs_linear_layers() -> None:
    model, twin = twins()
    for each in (model, twin):
        optimizer = kf.optim.KFAC(each, kf.Categorical(), lr=0.1, kl_clip=None, source="exact", stats_every=1)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(each(X), LABELS).backward()
            optimizer.step()
    torch.testing.assert_close(model(X), twin(X), rtol=1e-9, atol=1e-12)


def test_a_frozen_weight_leaves_the_bias() -> None:
    layer = Conv1D(3, 4)
    layer.weight.requires_grad_(False)
    assert TransposedLinear(layer, "layer").shape == (3, 1)


def test_a_forward_of_its_own_is_named() -> None:
    model = nn.Sequential(Own(3, 4), nn.Linear(3, 3).double())
    assert "Own has a forward of its own" in kf.coverage(model).uncovered["0.weight"]


def test_a_weight_that_is_computed_is_not_looked_at() -> None:
    """Each look at one normalised by its spectrum is a step of the power iteration."""
    layer = torch.nn.utils.parametrizations.spectral_norm(Graphs(4, 4))
    buffers = [buffer.clone() for buffer in layer.buffers()]
    model = nn.Sequential(layer, nn.Linear(4, 3).double())
    uncovered = kf.coverage(model).uncovered
    assert "computed from other parameters" in uncovered["0.bias"]
    assert all(map(torch.equal, layer.buffers(), buffers))
