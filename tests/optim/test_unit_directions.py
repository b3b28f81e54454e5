"""Normalisation layers preconditioned together have the directions of each by itself."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tests.exactness_helpers import draw
from torch import Tensor, nn

import kronfac as kf
from kronfac.blocks import Inverse, Uniform
from kronfac.layers import LayerAdapter, adapt_model
from kronfac.optim.directions import directions
from kronfac.optim.unit_directions import UnitDirections


def model() -> nn.Module:
    """Units with weight and bias, with one of the two, of two dtypes, and a layer that is no norm."""
    half = nn.BatchNorm1d(4)
    half.weight.requires_grad_(False)
    parts = [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm((2, 2)), half, nn.RMSNorm(5), nn.GroupNorm(2, 6)]
    return nn.Sequential(*parts, nn.LayerNorm(3).double())


def prepared(net: nn.Module) -> tuple[dict[str, LayerAdapter], dict[str, Inverse], dict[str, Tensor]]:
    adapters = dict(adapt_model(net).adapters)
    inverses = {}
    for name, adapter in adapters.items():
        statistic = kf.approximations.KFAC().start(adapter)
        for index, mean in enumerate(statistic.means().values()):
            rows = draw(*mean.total.shape[:-1], 7, seed=index).to(mean.total)
            mean.total.add_(rows @ rows.mT)
            mean.weight = 2.0
        block = statistic.block()
        inverses[name] = block.factorise(Uniform(0.3))
    gradients = {name: draw(*p.shape).to(p) for name, p in net.named_parameters() if p.requires_grad}
    return adapters, inverses, gradients


def test_they_are_the_directions_of_each_layer() -> None:
    adapters, inverses, gradients = prepared(model())
    found, layers = UnitDirections()(adapters, inverses, gradients)
    assert layers == {"1", "2", "3", "4", "5", "6"}
    wanted = directions(adapters, inverses, gradients)
    assert set(found) == {name for name in gradients if not name.startswith("0.")}
    for name, direction in found.items():
        assert direction.dtype == gradients[name].dtype
        torch.testing.assert_close(direction, wanted[name], rtol=1e-6, atol=1e-6)


def test_a_layer_with_a_part_of_its_gradients_is_left_to_others() -> None:
    adapters, inverses, gradients = prepared(model())
    del gradients["1.bias"]
    assert "1" not in UnitDirections()(adapters, inverses, gradients)[1]


def test_new_inverses_are_seen_and_old_ones_let_go() -> None:
    adapters, inverses, gradients = prepared(model())
    units = UnitDirections()
    units(adapters, inverses, gradients)
    old = weakref.ref(inverses["2"])
    block = torch.eye(2).expand(4, 2, 2).contiguous()
    inverses["2"] = kf.blocks.Dense(block, adapters["2"].shape).factorise(Uniform(1.0))
    gc.collect()
    assert old() is None
    found, _ = units(adapters, inverses, gradients)
    torch.testing.assert_close(found["2.weight"], gradients["2.weight"] / 2)


@pytest.mark.parametrize("norm", ["unitwise", "full"])
def test_a_step_takes_them(norm: str) -> None:
    """The direction of a step is the damped block's solution, for all layers."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2), nn.LayerNorm(2)).double()
    options = {"momentum": 0.0, "kl_clip": None, "damping": 0.1, "norm": norm}
    optimizer = kf.optim.KFAC(net, kf.Categorical(), lr=1.0, **options)  # type: ignore[arg-type]
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    torch.nn.functional.cross_entropy(net(draw(6, 3)), torch.arange(6) % 2).backward()
    optimizer.step()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    blocks = optimizer.curvature().blocks
    for name in ("1", "4"):
        adapter = adapt_model(net, norm=norm).adapters[name]
        matrix = adapter.pack({key: gradients[key] for key in adapter.parameter_names})
        solved = adapter.unpack(blocks[name].factorise(Uniform(0.1)).apply(matrix))
        for key, direction in solved.items():
            torch.testing.assert_close(net.get_parameter(key), before[key] - direction, rtol=1e-10, atol=1e-10)
