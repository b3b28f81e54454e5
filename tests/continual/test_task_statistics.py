"""Statistics of batch norm from the moments that a task left behind."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tests.continual.batchnorm_cases import CASES, unsettled
from torch import Tensor, nn

import kronfac as kf
from kronfac.continual import TaskStatistics, merge_batchnorm


@pytest.fixture(params=[name for name in CASES if name != "untraceable"])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    make, shape = CASES[request.param]
    torch.manual_seed(0)
    return unsettled(make()), 3 * torch.randn(shape, dtype=torch.float64) + 2


def seen_by_norms(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and unbiased variance at each batch norm of a copy in train mode."""
    model, found = copy.deepcopy(model).train(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):

            def keep(_: nn.Module, given: tuple[Tensor], name: str = name) -> None:
                rows = given[0].detach().transpose(0, 1).flatten(1)
                found[name] = (rows.mean(1), rows.var(1))

            module.register_forward_pre_hook(keep)
    model(x)
    return found


def test_they_are_those_of_any_weights_where_a_layers_inputs_stay(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    statistics = TaskStatistics(model)
    statistics.remember("old", [x])
    for pair in merge_batchnorm(model).pairs.values():
        with torch.no_grad():
            for parameter in pair.layer.parameters():
                parameter.add_(torch.randn_like(parameter))
        torch.testing.assert_close(
            statistics.statistics("old")[pair.norm_name],
            seen_by_norms(model, x)[pair.norm_name],
            rtol=1e-11,
            atol=1e-11,
        )
        # What lies behind sees other inputs now: its moments are taken anew.
        statistics.remember("old", [x])


def test_batches_are_pooled(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    whole, parts = TaskStatistics(model), TaskStatistics(model)
    whole.remember("a", [x])
    parts.remember("a", [x[:4], x[4:]])
    first = next(iter(merge_batchnorm(model).pairs.values())).norm_name
    torch.testing.assert_close(parts.statistics("a")[first], whole.statistics("a")[first], rtol=1e-11, atol=1e-11)


def test_the_model_has_them_within_the_block_alone(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    before = copy.deepcopy(model.state_dict())
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    statistics = TaskStatistics(model)
    statistics.remember("a", [x])
    statistics.remember("b", [x + 1])
    assert statistics.tasks == ("a", "b")
    expected = seen_by_norms(model, x)
    with statistics.using("a"):
        for name, (mean, variance) in expected.items():
            norm = model.get_submodule(name)
            torch.testing.assert_close(norm.running_mean, mean, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(norm.running_var, variance, rtol=1e-11, atol=1e-11)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]


def test_derivatives_outside_the_block_are_those_of_the_function_within(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    statistics = TaskStatistics(model)
    statistics.remember("A", [x])
    model.eval()
    parameters, compiled = list(model.parameters()), torch.compile(model, backend="eager")
    before = model(x).square().sum()
    plain = torch.autograd.grad(before, parameters, retain_graph=True)
    compiled(x)
    with statistics.using("A"):
        wanted = torch.autograd.grad(model(x).square().sum(), parameters)
        losses = [forward(x).square().sum() for forward in (model, compiled)]
    for loss in losses:
        torch.testing.assert_close(torch.autograd.grad(loss, parameters), wanted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(plain[0], wanted[0])
    torch.testing.assert_close(torch.autograd.grad(before, parameters), plain, rtol=0, atol=0)


def test_dropout_does_not_disturb_and_frozen_layers_are_seen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().train()
    model[1].requires_grad_(False)
    x = torch.randn(9, 5, dtype=torch.float64)
    statistics = TaskStatistics(model)
    statistics.remember("a", [x])
    mean, variance = statistics.statistics("a")["2"]
    torch.testing.assert_close((mean, variance), (model[1](x).mean(0), model[1](x).var(0)), rtol=1e-11, atol=1e-11)
    assert model[0].training
    assert not mean.requires_grad


def test_files_hold_them(case: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model, x = case
    statistics, other = TaskStatistics(model), TaskStatistics(model)
    statistics.remember("a task's name", [x])
    statistics.remember("b", [2 * x])
    statistics.save(tmp_path / "s.safetensors")
    other.load(tmp_path / "s.safetensors")
    assert other.tasks == statistics.tasks
    for name, found in statistics.statistics("b").items():
        assert all(torch.equal(*pair) for pair in zip(other.statistics("b")[name], found, strict=True))


def test_files_of_other_models_change_nothing(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "s.safetensors"
    wide = TaskStatistics(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)))
    narrow = TaskStatistics(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    named = TaskStatistics(nn.Sequential(nn.Identity(), nn.Linear(5, 4), nn.BatchNorm1d(4)))
    wide.remember("a", [torch.randn(6, 5)])
    narrow.remember("kept", [torch.randn(6, 3)])
    wide.save(path)
    with pytest.raises(kf.StorageError, match="moments of layer '0' do not fit its weight"):
        narrow.load(path)
    assert narrow.tasks == ("kept",)
    with pytest.raises(kf.StorageError, match="of a model with other layers"):
        named.load(path)


def test_what_cannot_be_remembered_is_named() -> None:
    with pytest.raises(TypeError, match="task must be a name, got 3"):
        TaskStatistics(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))).remember(3, [])  # type: ignore[arg-type]
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    statistics = TaskStatistics(model)
    statistics.remember("a", [torch.randn(6, 3)])
    before = statistics.statistics("a")["1"]
    with pytest.raises(ValueError, match="inputs is empty"):
        statistics.remember("a", [])
    with pytest.raises(ValueError, match=r"inputs of \['0'\] are not finite; nothing was remembered of task 'a'"):
        statistics.remember("a", [torch.full((6, 3), torch.nan)])
    assert all(torch.equal(*pair) for pair in zip(statistics.statistics("a")["1"], before, strict=True))
    assert bool(model[1].running_mean.isfinite().all())
    with pytest.raises(ValueError, match=r"nothing is known of task 'c'; there are \['a'\]"):
        statistics.statistics("c")
    with pytest.raises(ValueError, match="no batch norm to merge"):
        TaskStatistics(nn.Linear(3, 4))
