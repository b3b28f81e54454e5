"""Layers that are declared to have no curvature take the plain gradient, whatever a forward does with them."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.exactness_helpers import double, draw
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.layers import without_curvature

LABELS = torch.arange(12) % 3


class Mixer(nn.Module):
    """One layer's weight is used without calling it, one is called twice, one sees what is no row of examples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.twice = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = h * F.linear(h, self.gate.weight, self.gate.bias)
        h = self.twice(torch.tanh(self.twice(h)))
        out: Tensor = self.head(self.norm(torch.cat([h, 2 * h])).unflatten(0, (2, -1)).movedim(0, 1).flatten(1))
        return out


def declared() -> Mixer:
    model = double(Mixer())
    for layer in (model.gate, model.twice, model.norm):
        assert without_curvature(layer) is layer
    return model


def test_what_is_left_out_takes_the_plain_gradient_and_the_rest_is_exact() -> None:
    model, x = declared(), draw(12, 4)
    with pytest.warns(kf.CoverageWarning, match=r"gate\.weight.*left out, by kronfac\.layers\.without_curvature"):
        optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1, kl_clip=None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    F.cross_entropy(model(x), LABELS).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        plain = torch.allclose(parameter, before[name] - 0.1 * parameter.grad, rtol=1e-12, atol=0.0)
        assert plain == name.startswith(("gate", "twice", "norm"))
    exact = kf.reference.ggn(model, kf.Categorical(), x)
    with pytest.warns(kf.CoverageWarning):
        found = kf.estimate(model, kf.Categorical(), (x, LABELS), approximation="dense", source="exact")
    assert set(found.blocks) == {"first", "head"}
    torch.testing.assert_close(found.to_dense()[:25, :25], exact[:25, :25], rtol=1e-9, atol=1e-12)


def test_coverage_says_why_and_copies_stay_declared() -> None:
    model = copy.deepcopy(without_curvature(double(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))[0]))
    whole = nn.Sequential(model, nn.Tanh(), nn.Linear(5, 3).double())
    assert list(kf.coverage(whole).uncovered) == ["0.weight", "0.bias"]
    assert "without_curvature" in kf.coverage(whole).uncovered["0.weight"]


def test_a_whole_module_is_left_out() -> None:
    model = double(nn.Sequential(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5)), nn.Linear(5, 3)))
    without_curvature(model[0])
    assert set(kf.layers.adapt_model(model).adapters) == {"1"}


def test_what_cannot_be_left_out() -> None:
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, not str"):
        without_curvature("head")  # type: ignore[type-var]
    with pytest.raises(TypeError, match="Tanh has no parameter"):
        without_curvature(nn.Tanh())


@pytest.mark.parametrize("layer", ["gate", "twice", "norm"])
def test_errors_name_the_way_out(layer: str) -> None:
    model = declared()
    delattr(getattr(model, layer), kf.layers.base.LEFT_OUT)
    with pytest.warns(kf.CoverageWarning), pytest.raises((RuntimeError, ValueError)) as caught:
        kf.estimate(model, kf.Categorical(), (draw(12, 4), LABELS))
    assert layer in str(caught.value)
    assert "kronfac.layers.without_curvature" in str(caught.value)
