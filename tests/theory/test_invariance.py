"""Theorem 3 of Grosse & Martens (2016): KFC's updates do not see pointwise affine changes of the activations.

The transformed network is built by hand, from equation (34) and Lemma 2: its modules are ordinary ones with other
parameters, and its activation functions transform before and after the nonlinearity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tests.exactness_helpers import double, draw, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf

CHANNELS = (2, 3, 4, 5, 3)  # of the input and of the outputs of the four layers


@dataclass
class Change:
    """``S ↦ S M + 1 cᵀ`` on channels: the rows of the paper's matrices are locations."""

    matrix: Tensor
    shift: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        shift = self.shift.view(-1, *(1 for _ in x.shape[2:]))
        return torch.einsum("nc...,cd->nd...", x, self.matrix) + shift


def identity(channels: int) -> Change:
    return Change(torch.eye(channels).double(), torch.zeros(channels).double())


def drawn(channels: int, seed: int, shifted: bool = True) -> Change:
    matrix = torch.eye(channels).double() + 0.3 * draw(channels, channels, seed=seed)
    return Change(matrix, draw(channels, seed=seed + 100) if shifted else torch.zeros(channels).double())


class Network(nn.Module):
    """Convolution, strided convolution and two linear layers.

    ``before[l]`` is (U, c) of layer l + 1, ``after[l]`` is (V, d) of the activations that layer l + 1 reads, those of
    the input first. A margin of zeros around the activations belongs to the activation function, and is transformed
    with it, or to the convolution, as ``pad`` says.
    """

    def __init__(self, before: list[Change], after: list[Change], pad: str) -> None:
        super().__init__()
        inner = 1 if pad == "inner" else 0
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(2, 3, 3, padding=inner),
                nn.Conv2d(3, 4, 3, stride=2, padding=inner),
                nn.Linear(16 if pad == "none" else 36, 5),
                nn.Linear(5, 3),
            ]
        )
        self.before, self.after, self.outer = before, after, pad == "outer"

    def forward(self, x: Tensor) -> Tensor:
        for index, (layer, before, after) in enumerate(zip(self.layers, self.before, self.after, strict=True)):
            if self.outer and index < 2:
                x = F.pad(x, (1, 1, 1, 1))
            x = after(x)
            x = before(layer(x.flatten(1) if index == 2 else x))
            x = torch.tanh(x) if index < 3 else x
        return x


def plain(pad: str) -> Network:
    changes = [identity(c) for c in CHANNELS]
    return double(Network(changes[1:], changes[:-1], pad))  # type: ignore[return-value]


def transformed(net: Network, before: list[Change], after: list[Change], pad: str) -> Network:
    """The network of Lemma 2: ``W† = U⁻ᵀ W V⁻ᵀ`` and ``b† = U⁻ᵀ (b - c - W V⁻ᵀ d)``, equation (89)."""
    other = Network(before, after, pad).double()
    with torch.no_grad():
        for old, new, (u, v) in zip(net.layers, other.layers, zip(before, after, strict=True), strict=True):
            weight = old.weight.view(len(old.weight), len(v.shift), -1)  # outputs, channels, offsets or locations
            weight = torch.einsum("oct,dc->odt", weight, v.matrix.inverse())
            lost = torch.einsum("odt,d->o", weight, v.shift)
            back = u.matrix.T.inverse()
            new.weight.copy_(torch.einsum("po,odt->pdt", back, weight).reshape(new.weight.shape))
            new.bias.copy_(back @ (old.bias - u.shift - lost))
    return other


def changes(pad: str, kinds: str = "UVcd") -> tuple[list[Change], list[Change]]:
    before = [drawn(c, i + 1) if "U" in kinds else identity(c) for i, c in enumerate(CHANNELS[1:])]
    # Zeros that a convolution itself adds are not transformed: only d = 0 keeps the function (see below).
    after = [drawn(c, i + 11, shifted=not (pad == "inner" and i < 2)) for i, c in enumerate(CHANNELS[:-1])]
    return before, after if "V" in kinds else [identity(c) for c in CHANNELS[:-1]]


def data(pad: str) -> tuple[Tensor, Tensor]:
    side = 7 if pad == "none" else 6
    y = torch.randint(0, 2, (60, 3), generator=seeded(3)).double()
    return draw(60, 2, side, side, seed=4), y


def step(net: Network, pad: str, update: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    x, y = data(pad)
    names, parameters = zip(*net.named_parameters(), strict=True)
    loss = F.binary_cross_entropy_with_logits(net(x), y)
    gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    with torch.no_grad():
        for name, direction in update(gradients).items():
            net.get_parameter(name).sub_(0.3 * direction)


def natural(net: Network, pad: str, **options: object) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    curvature = kf.estimate(net, kf.Bernoulli(), data(pad), **options)  # type: ignore[arg-type]
    return curvature.factorise(0.0).apply


def functions_after(pad: str, kinds: str = "UVcd", **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs on fresh inputs: before the step, and after it of the network and of its transformed twin."""
    net = plain(pad)
    twin = transformed(net, *changes(pad, kinds), pad)
    x = draw(20, *data(pad)[0].shape[1:], seed=9)
    start = net(x)
    torch.testing.assert_close(twin(x), start, rtol=1e-10, atol=1e-10)  # Lemma 2
    for network in (net, twin):
        step(network, pad, natural(network, pad, **options) if options else lambda gradient: gradient)
    return start.detach(), net(x).detach(), twin(x).detach()


@pytest.mark.parametrize("source", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("pad", ["none", "outer", "inner"])
def test_kfc_is_invariant(pad: str, source: str) -> None:
    start, one, other = functions_after(pad, approximation="kfac", source=source)
    assert (one - start).norm() > 1e-2 * start.norm(), "the step moves the function"
    assert (one - other).norm() < 1e-8 * one.norm()


@pytest.mark.parametrize("pad", ["none", "outer", "inner"])
def test_uncorrelated_activations_keep_the_invariance(pad: str) -> None:
    """Means and covariances of channels transform as the activations do."""
    start, one, other = functions_after(pad, approximation="sua", source="exact")
    assert (one - start).norm() > 1e-2 * start.norm()
    assert (one - other).norm() < 1e-8 * one.norm()


def test_white_derivatives_keep_the_half_that_is_about_activations() -> None:
    start, one, other = functions_after("none", "Vd", approximation="prong", source="exact")
    assert (one - start).norm() > 1e-2 * start.norm()
    assert (one - other).norm() < 1e-8 * one.norm()
    _, one, other = functions_after("none", "Uc", approximation="prong", source="exact")
    assert (one - other).norm() > 1e-3 * one.norm()


@pytest.mark.parametrize("pad", ["none", "outer", "inner"])
@pytest.mark.parametrize("kinds", ["Uc", "Vd", "UVcd"])
def test_gradient_descent_is_not_invariant(pad: str, kinds: str) -> None:
    _, one, other = functions_after(pad, kinds)
    assert (one - other).norm() > 1e-3 * one.norm()


def test_neither_is_a_diagonal() -> None:
    net = plain("none")
    twin = transformed(net, *changes("none"), "none")
    x = draw(20, 2, 7, 7, seed=9)
    for network in (net, twin):
        step(network, "none", natural(network, "none", approximation="diagonal", source="exact"))
    assert (net(x) - twin(x)).norm() > 1e-3 * net(x).norm()


def test_shifted_activations_need_their_padding_shifted_too() -> None:
    """Equation (84) shifts the zeros around the map as well; a convolution's own zeros stay. Lemma 2 then fails."""
    net, (before, after) = plain("inner"), changes("outer")
    twin = transformed(net, before, after, "inner")
    x = draw(20, 2, 6, 6, seed=9)
    assert (net(x) - twin(x)).norm() > 1e-2 * net(x).norm()
