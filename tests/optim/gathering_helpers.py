"""Shorthands of the tests of gathering."""

from __future__ import annotations

from typing import Any

import torch
from tests.optim.unclipped import unclipped
from torch import Tensor, nn

import kronfac as kf


def make(model: nn.Module, **options: Any) -> kf.optim.KFAC:
    options = {"source": "exact", "damping": 0.1, **options}
    likelihood = options.pop("likelihood", kf.Categorical())
    return unclipped(model, likelihood, lr=0.1, **options)


def factors(optimizer: kf.optim.KFAC) -> dict[str, Tensor]:
    blocks = optimizer.curvature().blocks
    return {f"{name}.{key}": t for name, block in blocks.items() for key, t in block.tensors().items()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def estimated(
    model: nn.Module, *pairs: tuple[Tensor, Any], likelihood: kf.Likelihood | None = None
) -> dict[str, Tensor]:
    curvature = kf.estimate(model, likelihood or kf.Categorical(), list(pairs), source="exact")
    return {f"{name}.{key}": t for name, block in curvature.blocks.items() for key, t in block.tensors().items()}


LABELS = torch.arange(8) % 3
