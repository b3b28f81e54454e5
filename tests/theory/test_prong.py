"""Theorem 4 of Grosse & Martens (2016): SUA and WD, the counts β dropped, are gradient descent in whitened coordinates.

PRONG is done here as its authors do it: whiten what each layer reads (its channels, for a convolution), rewrite the
parameters so that the function stays, take a plain gradient step, write the parameters back.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.exactness_helpers import double, draw
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.approximations import PRONG, Approximation

LR = 0.2


class Network(nn.Module):
    """Two convolutions and two linear layers; ``whiten[l]`` changes what layer l reads, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3, stride=2), nn.Linear(16, 5), nn.Linear(5, 3)]
        )
        self.whiten: list[Callable[[Tensor], Tensor]] = [lambda x: x] * 4
        self.read: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.read = []
        for index, (layer, whiten) in enumerate(zip(self.layers, self.whiten, strict=True)):
            x = x.flatten(1) if index == 2 else x
            self.read.append(x.detach())
            x = layer(whiten(x))
            x = torch.tanh(x) if index < 3 else x
        return x


def network() -> Network:
    return double(Network())  # type: ignore[return-value]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the channels, over examples and locations."""
    columns = x.transpose(0, 1).flatten(1)
    return columns.mean(1), torch.cov(columns, correction=0)


def cholesky(sigma: Tensor) -> Tensor:
    return torch.linalg.cholesky(sigma)


def symmetric(sigma: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(sigma)
    return vectors @ values.sqrt().diag() @ vectors.T


def other_root(sigma: Tensor) -> Tensor:
    """Any root will do: one that is neither triangular nor symmetric."""
    rotation = torch.linalg.qr(draw(len(sigma), len(sigma), seed=8))[0]
    return torch.linalg.cholesky(sigma) @ rotation


def prong_step(net: Network, x: Tensor, y: Tensor, root: Callable[[Tensor], Tensor]) -> None:
    """One update of idealised PRONG, which has the exact statistics of the data."""
    net(x)
    before = net(x).detach()
    roots, means = [], []
    for index, layer in enumerate(net.layers):
        mu, sigma = moments(net.read[index])
        b = root(sigma)
        roots.append(b)
        means.append(mu)
        with torch.no_grad():  # a = B a† + μ:  W† = W (B ⊗ I), b† = b + W (μ ⊗ 1)
            weight = layer.weight.view(len(layer.weight), len(mu), -1)
            layer.bias.add_(torch.einsum("oct,c->o", weight, mu))
            layer.weight.copy_(torch.einsum("oct,cd->odt", weight, b).reshape(layer.weight.shape))

    def whitening(b: Tensor, mu: Tensor) -> Callable[[Tensor], Tensor]:
        inverse = b.inverse()
        return lambda a: torch.einsum("dc,nc...->nd...", inverse, a - mu.view(-1, *(1 for _ in a.shape[2:])))

    net.whiten = [whitening(b, mu) for b, mu in zip(roots, means, strict=True)]
    torch.testing.assert_close(net(x), before, rtol=1e-9, atol=1e-9)  # the function stays
    white = [moments(whiten(a)) for whiten, a in zip(net.whiten, net.read, strict=True)]
    for mu, sigma in white:
        torch.testing.assert_close(mu, torch.zeros_like(mu), rtol=0, atol=1e-9)
        torch.testing.assert_close(sigma, torch.eye(len(mu)).double(), rtol=0, atol=1e-8)
    parameters = list(net.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(net(x), y), parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(LR * gradient)
        for layer, b, mu in zip(net.layers, roots, means, strict=True):
            weight = layer.weight.view(len(layer.weight), len(mu), -1)
            weight = torch.einsum("odt,dc->oct", weight, b.inverse())
            layer.weight.copy_(weight.reshape(layer.weight.shape))
            layer.bias.sub_(torch.einsum("oct,c->o", weight, mu))
    net.whiten = [lambda a: a] * 4


def curvature_step(
    net: Network, x: Tensor, y: Tensor, approximation: str | Approximation, source: str
) -> dict[str, Tensor]:
    """``θ - α F̂⁻¹∇h``; returns the step's direction."""
    curvature = kf.estimate(net, kf.Categorical(), (x, y), approximation=approximation, source=source)
    names, parameters = zip(*net.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(F.cross_entropy(net(x), y), parameters), strict=True))
    direction = curvature.factorise(0.0).apply(gradients)
    with torch.no_grad():
        for name, value in direction.items():
            net.get_parameter(name).sub_(LR * value)
    return direction


def batch() -> tuple[Tensor, Tensor]:
    return draw(60, 2, 7, 7, seed=4) + 0.5, torch.arange(60) % 3


@pytest.mark.parametrize("root", [cholesky, symmetric, other_root])
def test_the_update_is_a_gradient_step_in_whitened_coordinates(root: Callable[[Tensor], Tensor]) -> None:
    one, other, (x, y) = network(), network(), batch()
    start = {name: p.detach().clone() for name, p in one.named_parameters()}
    prong_step(one, x, y, root)
    curvature_step(other, x, y, "prong", "forward_only")
    fresh = draw(20, 2, 7, 7, seed=9)
    assert (one(fresh) - other(fresh)).norm() < 1e-8 * one(fresh).norm()
    for name, parameter in other.named_parameters():
        moved = (parameter - start[name]).norm()
        assert moved > 1e-4
        assert (parameter - one.get_parameter(name)).norm() < 1e-8 * moved


def test_derivatives_scale_the_step_of_each_layer() -> None:
    """With cotangents a layer's step is the theorem's over ``tr G / d_out``."""
    (x, y), kfac = batch(), kf.estimate(network(), kf.Categorical(), batch(), source="exact")
    white = curvature_step(network(), x, y, "prong", "forward_only")
    scaled = curvature_step(network(), x, y, "prong", "exact")
    for name, direction in scaled.items():
        g = kfac.blocks[name.rpartition(".")[0]].tensors()["output"]
        wanted = white[name] * len(g) / g.trace()
        assert (direction - wanted).norm() < 1e-8 * wanted.norm()


@pytest.mark.parametrize("approximation", ["kfac", "sua", PRONG(boundaries=True)])
def test_the_other_approximations_are_not_prong(approximation: str | Approximation) -> None:
    """Spatial correlations (kfac) make a difference; without padding, β does not (sua, with boundaries)."""
    (x, y), difference = batch(), {}
    x = x + draw(60, 2, 1, 1, seed=6)  # correlated over locations
    wanted = curvature_step(network(), x, y, "prong", "forward_only")
    found = curvature_step(network(), x, y, approximation, "forward_only")
    difference = {name: float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted}
    if approximation == "kfac":
        assert min(difference["layers.0.weight"], difference["layers.1.weight"]) > 1e-2
        assert max(difference["layers.2.weight"], difference["layers.3.weight"]) < 1e-8
    else:
        assert max(difference.values()) < 1e-8


def test_with_padding_dropping_the_counts_matters() -> None:
    x, y = draw(60, 2, 6, 6, seed=4) + 0.5, torch.arange(60) % 3
    nets = [double(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(108, 3)))] * 2
    found = [
        kf.estimate(net, kf.Categorical(), (x, y), approximation=kind, source="forward_only").blocks["0"]
        for net, kind in zip(nets, ("prong", "sua"), strict=True)
    ]
    assert (found[0].to_dense() - found[1].to_dense()).norm() > 1e-2 * found[1].to_dense().norm()
