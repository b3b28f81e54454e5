"""Models with hooks of the user's, and models that were compiled."""

from __future__ import annotations

import pytest
import torch
from tests.exactness_helpers import double, draw
from torch import nn

import kronfac as kf

LABELS = torch.arange(8) % 3


def network() -> nn.Sequential:
    return double(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))


@pytest.mark.parametrize("kind", ["output", "input"])
def test_hooks_of_the_users_are_no_part_of_a_layer(kind: str) -> None:
    model, x = network(), draw(8, 4)
    if kind == "output":
        model[0].register_forward_hook(lambda module, args, output: 3 * output)
    else:
        model[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    kf.verify(model, kf.Categorical(), (x, LABELS), source="exact").raise_if(scale=1e-8)
    dense = kf.estimate(model, kf.Categorical(), (x, LABELS), approximation="dense", source="exact")
    exact = kf.GaussNewtonOperator(model, kf.Categorical(), [(x, LABELS)]).to_dense()
    torch.testing.assert_close(dense.to_dense()[:30, :30], exact[:30, :30])


def test_of_a_compiled_model_it_is_the_module_inside() -> None:
    model, x = network(), draw(8, 4)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    found = kf.estimate(compiled, kf.Categorical(), (x, LABELS), source="exact")
    wanted = kf.estimate(model, kf.Categorical(), (x, LABELS), source="exact")
    assert found.parameter_names == wanted.parameter_names
    assert torch.equal(found.to_dense(), wanted.to_dense())
    kf.verify(compiled, kf.Categorical(), (x, LABELS), source="exact").raise_if(scale=1e-8)
