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


def test_coverage_names_the_parameters_of_the_module_inside() -> None:
    model = network()
    wanted = kf.coverage(model).to_dict()
    assert kf.coverage(torch.compile(model, backend="eager")).to_dict() == wanted
    assert kf.coverage(nn.DataParallel(model)).to_dict() == wanted


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_coverage_of_a_scripted_model_says_that_it_has_none() -> None:
    report = kf.coverage(torch.jit.script(network()))
    assert report.fraction == 0
    assert all("RecursiveScriptModule" in reason for reason in report.uncovered.values())


def test_group_norm_with_channels_last() -> None:
    model = double(nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(1, 4), nn.Conv2d(4, 2, 1)))
    x = draw(3, 2, 4, 6).contiguous(memory_format=torch.channels_last)
    report = kf.verify(model, kf.Gaussian(), (x, None))
    report.raise_if(scale=1e-8)
    assert report.rows[1].trace_factor is not None


@pytest.mark.parametrize("base", [kf.approximations.KFAC(), kf.approximations.TKFAC()])
@pytest.mark.parametrize("norm", ["unitwise", "full"])
def test_each_part_of_a_limited_approximation_is_held_to_its_own_definition(
    base: kf.approximations.Approximation, norm: str
) -> None:
    model = double(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)))
    limited = kf.approximations.Limited(6, base=kf.approximations.Limited(6, base=base))
    report = kf.verify(model, kf.Categorical(), (draw(8, 4), LABELS), approximation=limited, norm=norm)
    report.raise_if(scale=1e-8)
    rows = {row.layer: row for row in report.rows}
    assert (rows["0"].input_factor is not None) == (base.name == "kfac")
    assert rows["0"].trace_factor is None or base.name == "tkfac"
    assert rows["1"].trace_factor is not None
    assert rows["3"].block == "diagonal"
    assert rows["3"].trace_factor is not None


def test_tkfac_with_whole_blocks_of_norms() -> None:
    model = double(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)))
    kf.verify(model, kf.Categorical(), (draw(8, 4), LABELS), approximation="tkfac", norm="full").raise_if(scale=1e-8)
