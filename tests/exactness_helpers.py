"""Dense blocks cut out of the oracle's matrix, and small float64 models to compare them on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kronfac as kf
from kronfac.curvature import BlockDiagonal
from kronfac.layers import LayerAdapter


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def double(model: nn.Module, seed: int = 0, scale: float = 0.5) -> nn.Module:
    """The model in float64 with parameters drawn anew, so that no test depends on a global seed."""
    model = model.double()
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def positions(model: nn.Module, adapter: LayerAdapter) -> Tensor:
    """Where the entries of a layer's matrix ``V`` stand in ``parameters_to_vector`` over the trained parameters."""
    start, numbered = 0, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            numbered[name] = torch.arange(start, start + parameter.numel()).view(parameter.shape)
            start += parameter.numel()
    return adapter.pack({name: numbered[name] for name in adapter.parameter_names})


def relative(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    assert wanted.norm() > 0, "nothing to compare with"
    return float((found - wanted).norm() / wanted.norm())


def block_errors(curvature: BlockDiagonal, model: nn.Module, dense: Tensor) -> dict[str, float]:
    """Relative Frobenius error of every block (of every stack element together) against the oracle's matrix."""
    errors = {}
    for name, block in curvature.blocks.items():
        adapter = curvature.layouts[name]
        assert isinstance(adapter, LayerAdapter)
        places = positions(model, adapter)
        stack = places.reshape(-1, adapter.d_out * adapter.d_in) if adapter.stack else places.reshape(1, -1)
        parts = [dense[place][:, place] for place in stack]
        errors[name] = relative(block.to_dense(), torch.block_diag(*parts))
    return errors


def ggn_errors(
    model: nn.Module, likelihood: kf.Likelihood, x: Any, y: Any, *, approximation: str = "kfac", **options: Any
) -> dict[str, float]:
    """Errors of all blocks from the exact source against the oracle's generalised Gauss-Newton matrix."""
    options.setdefault("source", "exact")
    curvature = kf.estimate(model, likelihood, (x, y), approximation=approximation, **options)
    return block_errors(curvature, model, kf.reference.ggn(model, likelihood, x, y))
