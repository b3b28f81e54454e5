"""What the hooks leave behind: errors, copies, changed models, compiled ones."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw
from tests.optim.gathering_helpers import LABELS, hooks, make
from tests.optim.hand_kfac import network
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf


def test_an_error_in_the_forward_leaves_no_layer_hooks() -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(draw(8, 4))
    assert hooks(model) == 2
    F.cross_entropy(model(x), LABELS).backward()
    optimizer.step()


def test_layers_that_are_called_twice_are_refused_and_forgotten() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = double(nn.Linear(3, 3))

        def forward(self, x: Tensor, times: int = 1) -> Tensor:
            for _ in range(times):
                x = self.layer(x)
            return x

    model, x = Twice(), draw(8, 3)
    optimizer = make(model)
    with pytest.raises(kf.TapeError, match="'layer' is used more than once"):
        model(x, times=2)
    assert hooks(model) == 2
    F.cross_entropy(model(x), LABELS).backward()
    optimizer.step()


def test_hooks_go_with_the_optimiser() -> None:
    model = network()
    optimizer = make(model)
    assert hooks(model) == 2
    del optimizer
    gc.collect()
    assert hooks(model) == 0


def test_two_optimisers_share_a_model() -> None:
    model, x = network(), draw(8, 3)
    first, second = make(model), make(model, approximation="diagonal")
    F.cross_entropy(model(x), LABELS).backward()
    assert first._gatherer.gathered == second._gatherer.gathered == 1
    first.step()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_model_do_not_feed_the_optimiser(how: str) -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(x), network()(x))
    assert optimizer._gatherer.gathered == optimizer._gatherer.forwards == 0
    model(x)
    assert optimizer._gatherer.gathered == 1
    other = make(twin)
    twin(x)
    assert optimizer._gatherer.gathered == 1
    assert other._gatherer.gathered == 1


def replace_layer(model: nn.Sequential) -> None:
    model[2] = double(nn.Linear(4, 5))


def add_layer(model: nn.Sequential) -> None:
    model.append(double(nn.Linear(3, 3)))


def replace_parameter(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))


@pytest.mark.parametrize("change", [replace_layer, add_layer, replace_parameter])
def test_a_model_that_changes_is_refused(change: Any) -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model, stats_every=100, burn_in=0)
    F.cross_entropy(model(x), LABELS).backward()
    optimizer.step()
    change(model)
    before = copy.deepcopy(model)
    F.cross_entropy(model(x), LABELS).backward()  # no statistics are due
    with pytest.raises(kf.TapeError, match=r"layers or parameters were replaced.*construct a new one"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    fresh = make(network())
    fresh._gatherer.root.append(nn.ReLU())
    with pytest.raises(kf.TapeError, match="layers or parameters were replaced"):
        fresh._gatherer.root(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_models_are_replayed_eagerly(backend: str) -> None:
    torch._dynamo.reset()
    plain, model = network(), network()
    compiled = torch.compile(model, backend=backend)
    optimizer, other = make(compiled, kl_clip=1e-3, source="sampled"), make(plain, kl_clip=1e-3, source="sampled")
    assert optimizer.curvature is not None
    for step in range(3):
        x = draw(8, 3, seed=step)
        for m, o in ((compiled, optimizer), (plain, other)):
            o.zero_grad()
            F.cross_entropy(m(x), LABELS).backward()
            assert o._gatherer.gathered == 1
            o.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_replay_touches_no_buffer_that_the_backward_needs() -> None:
    torch._dynamo.reset()
    model = double(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    model[1].eval()  # saves its running statistics for the backward
    compiled = torch.compile(model, backend="eager")
    optimizer = make(compiled)
    F.cross_entropy(compiled(draw(8, 3)), LABELS).backward()
    optimizer.step()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_module_compiled_before_and_not_passed_is_told() -> None:
    torch._dynamo.reset()
    model, x = network(), draw(8, 3)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    optimizer = make(model)
    F.cross_entropy(compiled(x), LABELS).backward()
    with pytest.raises(RuntimeError, match="no forward of the model passed to KFAC was seen"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_replaying_changes_neither_buffers_nor_random_numbers() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    optimizer = make(compiled, source="sampled")
    x, after = torch.randn(8, 3), []
    for m in (compiled, twin):
        torch.manual_seed(1)
        m(x)
        after.append(torch.rand(3))
    assert torch.equal(*after)
    assert optimizer._gatherer.gathered == 1
    for name, buffer in twin.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)


def test_an_optimiser_that_is_collected_during_a_forward_leaves_no_hook_behind() -> None:
    """Its cycles wait for the garbage collector, which comes whenever it likes."""
    old: list[kf.optim.KFAC] = []

    class Collecting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            old.clear()
            gc.collect()
            return x

    model = nn.Sequential(nn.Linear(3, 4), Collecting(), nn.Linear(4, 2))
    old.append(kf.optim.KFAC(model, kf.Categorical(), 0.1))
    for _ in range(2):
        model(torch.ones(5, 3))
    assert not any(module._forward_hooks for module in model)


@pytest.mark.parametrize("options", [{}, {"asynchronous": 1}, {"kl_clip": None, "gradients": "rows"}])
def test_an_optimiser_that_was_dropped_hears_nothing_at_once(options: dict[str, Any]) -> None:
    model = double(nn.Sequential(nn.Linear(70, 80), nn.Tanh(), nn.Linear(80, 3)))
    gc.disable()
    try:
        optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1, **options)
        F.cross_entropy(model(draw(8, 70)), LABELS).backward()
        optimizer.step()
        del optimizer
        assert hooks(model) == 0
        optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1, **options)
        optimizer.zero_grad()
        F.cross_entropy(model(draw(8, 70)), LABELS).backward()
        optimizer.step()
    finally:
        gc.enable()


def test_a_capture_that_outlives_its_optimiser_does_nothing() -> None:
    model = network()
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1)
    with optimizer.capture() as capture:
        capture(model(draw(8, 3)))
    del optimizer
    gc.collect()
    model(draw(8, 3)).sum().backward()  # its hooks are still there, since the function holds them
    assert capture is not None


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"param_groups": [{"params": [nn.Parameter(torch.ones(1))]}]}])
def test_an_optimiser_that_refused_its_arguments_hears_nothing(options: dict[str, Any]) -> None:
    model = network()
    before = hooks(model)
    with pytest.raises(ValueError, match=r"lr=|param_groups") as caught:
        kf.optim.KFAC(model, kf.Categorical(), **{"lr": 0.1, **options})
    assert hooks(model) == before
    model(draw(6, 3)).sum().backward()
    assert caught.value is not None  # whose traceback keeps the optimiser alive
