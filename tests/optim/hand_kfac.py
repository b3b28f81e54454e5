"""KFAC written down once more, for a stack of linear layers, without any of the package's parts.

Only the likelihood's cotangents are taken from it, so that labels are drawn from the same generator.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from tests.exactness_helpers import double
from torch import Tensor, nn

import kronfac as kf


def network(seed: int = 0, scale: float = 0.7) -> nn.Sequential:
    model = double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), seed, scale)
    assert isinstance(model, nn.Sequential)
    return model


@dataclass
class HandKFAC:
    """Martens & Grosse 2015 with the conventions of `kronfac.optim.KFAC`."""

    model: nn.Sequential
    likelihood: kf.Likelihood
    lr: float
    momentum: float = 0.9
    damping: float = 1e-3
    weight_decay: float = 0.0
    decoupled: bool = False
    exact_damping: bool = False
    ema: float = 0.95
    kl_clip: float | None = None
    source: str = "exact"
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __post_init__(self) -> None:
        self.layers = [layer for layer in self.model if isinstance(layer, nn.Linear)]
        self.sums: list[dict[str, Tensor | float]] = [{"A": 0.0, "G": 0.0, "a": 0.0, "g": 0.0} for _ in self.layers]
        self.velocity = [torch.zeros(*layer.weight.shape, dtype=torch.float64) for layer in self.layers]
        self.velocity = [torch.cat((v, v[:, :1]), 1) for v in self.velocity]
        self.inverted: list[Tensor] = []
        self.scale = 1.0

    def decay(self) -> None:
        for sums in self.sums:
            for key in sums:
                sums[key] = self.ema * sums[key]

    def gather(self, x: Tensor) -> None:
        """Layer by layer; cotangents by autograd on the pre-activations."""
        rows, states = [], []
        value = x
        for module in self.model:
            if isinstance(module, nn.Linear):
                rows.append(torch.cat((value.detach(), torch.ones(len(x), 1, dtype=torch.float64)), 1))
                value = module(value)
                states.append(value)
            else:
                value = module(value)
        z = value.detach()
        if self.source == "exact":
            columns = list(self.likelihood.root_columns(z))
        else:
            columns = [self.likelihood.sample_cotangents(z, None, self.generator)]
        denominator = float(self.likelihood.denominator(z))
        for sums, a in zip(self.sums, rows, strict=True):
            sums["A"] = sums["A"] + a.T @ a
            sums["a"] += len(a)
            sums["g"] += denominator
        for column in columns:
            for sums, g in zip(self.sums, torch.autograd.grad(value, states, column, retain_graph=True), strict=True):
                sums["G"] = sums["G"] + g.T @ g

    def invert(self) -> None:
        """The damped inverse of each block as one dense matrix."""
        self.inverted = []
        added = self.damping + (0.0 if self.decoupled else self.weight_decay)
        for sums in self.sums:
            A, G = sums["A"] / sums["a"], sums["G"] / sums["g"]
            eye_a, eye_g = torch.eye(len(A), dtype=torch.float64), torch.eye(len(G), dtype=torch.float64)
            if self.exact_damping:
                damped = torch.kron(G, A) + added * torch.kron(eye_g, eye_a)
            else:
                pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
                damped = torch.kron(G + added**0.5 / pi * eye_g, A + pi * added**0.5 * eye_a)
            self.inverted.append(torch.linalg.inv(damped))

    @torch.no_grad()
    def step(self, clip_on: Tensor | None = None) -> None:
        directions = []
        for layer, inverse in zip(self.layers, self.inverted, strict=True):
            assert layer.weight.grad is not None
            parameters = torch.cat((layer.weight, layer.bias[:, None]), 1)
            gradient = torch.cat((layer.weight.grad, layer.bias.grad[:, None]), 1)
            if not self.decoupled:
                gradient = gradient + self.weight_decay * parameters
            directions.append((inverse @ gradient.flatten()).view_as(gradient))
        self.scale = 1.0
        if self.kl_clip is not None:
            self.scale = self.clip(directions, clip_on)
        for layer, direction, velocity in zip(self.layers, directions, self.velocity, strict=True):
            if self.decoupled:
                layer.weight.mul_(1 - self.lr * self.weight_decay)
                layer.bias.mul_(1 - self.lr * self.weight_decay)
            velocity.mul_(self.momentum).sub_(self.lr * self.scale * direction)
            layer.weight.add_(velocity[:, :-1])
            layer.bias.add_(velocity[:, -1])

    def clip(self, directions: list[Tensor], x: Tensor | None) -> float:
        """``min(1, √(C / vᵀFv))`` with the oracle's matrix."""
        assert x is not None
        assert self.kl_clip is not None
        v = torch.cat([part.flatten() for d in directions for part in (d[:, :-1], d[:, -1])]) * -self.lr
        form = float(v @ kf.reference.ggn(self.model, self.likelihood, x) @ v)
        form += 0.0 if self.decoupled else self.weight_decay * float(v @ v)
        return min(1.0, (self.kl_clip / form) ** 0.5)
