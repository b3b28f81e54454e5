"""KFAC that keeps rows in place of gradients: the run with gradients, and a refusal wherever it would not be."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double
from tests.optim.test_state import assert_same_state, through_a_file
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.optim.rows import pay

OPTIONS: dict[str, Any] = {"gradients": "rows", "kl_clip": None, "stats_every": 2, "invert_every": 5, "burn_in": 2}


def network() -> nn.Module:
    """Three layers, of which the first two are wide enough; an activation in place between them."""
    torch.manual_seed(0)
    return double(
        nn.Sequential(nn.Linear(70, 90), nn.ReLU(inplace=True), nn.Linear(90, 80), nn.Tanh(), nn.Linear(80, 3)),
        scale=0.1,
    )


def make(model: nn.Module, **options: Any) -> kf.optim.KFAC:
    return kf.optim.KFAC(model, kf.Categorical(), lr=0.05, damping=0.1, **{**OPTIONS, **options})


def batch(step: int, rows: int = 20) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, 70, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x, x[:, :3].argmax(1)


def backward(model: nn.Module, step: int, rows: int = 20) -> None:
    x, y = batch(step, rows)
    F.cross_entropy(model(x), y).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def parameters(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"momentum": 0.0},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"asynchronous": 2},
        {"inverse": "newton_schulz"},
        {"approximation": "tkfac"},
        {"stats_examples": 7},
        {"average": 0.9},
    ],
)
def test_thirty_steps_are_those_with_gradients(extra: dict[str, Any]) -> None:
    model, plain = network(), network()
    start = parameters(model).clone()
    train(model, make(model, **extra), range(30))
    train(plain, make(plain, **{**extra, "gradients": "dense"}), range(30))
    assert torch.linalg.norm(parameters(plain) - start) > 0.1
    torch.testing.assert_close(parameters(model), parameters(plain), rtol=1e-11, atol=1e-12)
    grads = {name: p.grad is None for name, p in model.named_parameters()}
    assert grads == {name: name in ("0.weight", "2.weight") for name in grads}  # what is narrow has its gradient


def test_accumulated_backwards_closures_and_positions() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).mean(1)

    torch.manual_seed(0)
    models = [Sequence(), Sequence()]
    for model, gradients in zip(models, ("rows", "dense"), strict=True):
        optimizer = make(model, gradients=gradients)
        for step in range(6):

            def closure(step: int = step, model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                for part in range(2):
                    x = torch.randn(5, 4, 70, generator=torch.Generator().manual_seed(9 * step + part)).double()
                    loss = F.cross_entropy(model(x), torch.arange(5) % 3) / 2
                    loss.backward()
                return loss

            optimizer.step(closure)
    torch.testing.assert_close(parameters(models[0]), parameters(models[1]), rtol=1e-11, atol=1e-12)


def test_autocast_and_a_gradient_scaler() -> None:
    models = [network().float(), network().float()]
    start = parameters(models[0]).clone()
    for model, gradients in zip(models, ("rows", "dense"), strict=True):
        optimizer = make(model, gradients=gradients)
        for step in range(10):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x, y = batch(step)
                loss = F.cross_entropy(model(x.float()), y)
            loss.backward()
            optimizer.step()
    moved = torch.linalg.norm(parameters(models[1]) - start)
    assert moved > 0.1
    assert torch.linalg.norm(parameters(models[0]) - parameters(models[1])) < 0.1 * moved  # whose gradients are rounded
    optimizer, scaler = make(models[0]), torch.amp.GradScaler("cpu")
    x, y = batch(0)
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(models[0](x.float()), y)).backward()
    with pytest.raises(RuntimeError, match="is not that of the rows"):  # it cannot unscale what it does not see
        scaler.step(optimizer)


def test_outputs_captured_by_hand_leave_the_gradients_dense() -> None:
    model = network()
    optimizer = make(model)
    for step in range(3):
        optimizer.zero_grad()
        x, y = batch(step)
        with optimizer.capture() as capture:
            outputs = model(x)
            capture(outputs)
        F.cross_entropy(outputs, y).backward()
        optimizer.step()
    assert optimizer.health()["0"].age is not None


def test_layers_take_the_cheaper_way_at_each_forward() -> None:
    model = network()
    optimizer = make(model)
    layer = optimizer._estimator.adaptation.adapters["0"]
    assert pay(layer, 20)
    assert not pay(layer, 500)
    backward(model, 0, rows=500)
    assert model.get_parameter("0.weight").grad is not None
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    backward(model, 0)  # no forward of training
    assert model.get_parameter("0.weight").grad is not None


@pytest.mark.parametrize("stop", [3, 6])
def test_a_resumed_run_is_the_run_that_never_stopped(stop: int) -> None:
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(stop))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, range(stop, stop + 9))
    resumed = network()
    other = make(resumed)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, range(stop, stop + 9))
    assert torch.equal(parameters(model), parameters(resumed))
    assert_same_state(other.state_dict(), optimizer.state_dict())


def _clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def _half(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None if p.grad is None else p.grad / 2


def _none(model: nn.Module) -> None:
    model.zero_grad()


def _again(model: nn.Module) -> None:
    model.zero_grad()
    backward(model, 1)


def _dense(model: nn.Module) -> None:
    backward(model, 1, rows=500)


@pytest.mark.parametrize("change", [_clip, _half, _none, _again, _dense])
def test_gradients_that_were_changed_are_refused(change: Any) -> None:
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(3))
    before = parameters(model).clone()
    optimizer.zero_grad()
    backward(model, 3)
    change(model)
    with pytest.raises(RuntimeError, match=r"bias's gradient of layer '2' is not that of the rows.*zero_grad\(\)"):
        optimizer.step()
    assert torch.equal(parameters(model), before)
    train(model, optimizer, range(4, 6))  # and it goes on
    assert not torch.equal(parameters(model), before)


def test_an_input_that_was_changed_in_place_is_refused() -> None:
    model = network()
    optimizer = make(model)
    x, y = batch(0)
    loss = F.cross_entropy(model(x), y)
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match="input of layer '0' was changed in place"):
        loss.backward()
    optimizer.zero_grad()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"input of layer '0' was changed in place.*after optimizer\.step\(\)"):
        optimizer.step()


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(3))
    before = parameters(model).clone()
    optimizer.zero_grad()
    x, y = batch(3)
    (F.cross_entropy(model(x), y) * torch.nan).backward()
    with pytest.raises(FloatingPointError, match=r"gradient of 0\.bias"):
        optimizer.step()
    assert torch.equal(parameters(model), before)


def test_what_needs_gradients_is_refused() -> None:
    for options, text in (
        ({"kl_clip": "auto"}, "kl_clip, which multiplies directions by gradients: set kl_clip=None"),
        ({"weight_decay": 0.1}, "weight decay in the gradient: set decoupled_weight_decay=True"),
    ):
        with pytest.raises(ValueError, match=f"gradients='rows' does not go with {text}"):
            make(double(nn.Sequential(nn.Linear(140, 150), nn.Linear(150, 3))), **options)
    with pytest.raises(ValueError, match="at least 64 inputs and outputs, and the model has none"):
        make(double(nn.Sequential(nn.Linear(70, 20), nn.Tanh(), nn.Linear(20, 3))))
    with pytest.raises(ValueError, match="gradients='rows' does not fit damping_rule='exact'"):
        make(network(), damping_rule="exact")
    with pytest.raises(ValueError, match="gradients='rows' does not fit AdaptiveKFAC"):
        kf.optim.AdaptiveKFAC(network(), kf.Categorical(), gradients="rows")
    with pytest.raises(ValueError, match="does not go with a model that was compiled"):
        make(torch.compile(network(), backend="eager"))  # type: ignore[arg-type]
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(1))
    optimizer.param_groups[0]["kl_clip"] = 0.1
    with pytest.raises(ValueError, match="does not go with kl_clip"):
        train(model, optimizer, range(1, 2))


def test_a_forward_that_raises_leaves_the_weight_trainable() -> None:
    model = network()
    optimizer = make(model)
    with pytest.raises(RuntimeError, match="shape"):
        model(torch.randn(5, 71, dtype=torch.float64))
    assert all(p.requires_grad for p in model.parameters())
    train(model, optimizer, range(2))
    with torch.no_grad():
        model(batch(0)[0])
    assert all(p.requires_grad for p in model.parameters())


def test_copies_and_models_without_their_optimiser_have_gradients() -> None:
    model = network()
    optimizer = make(model)
    twin = copy.deepcopy(model)
    backward(twin, 0)
    assert all(p.grad is not None for p in twin.parameters())
    del optimizer
    gc.collect()
    backward(model, 0)
    assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(model.get_parameter("0.weight").grad, twin.get_parameter("0.weight").grad)
