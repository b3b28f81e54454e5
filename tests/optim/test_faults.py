"""What went wrong in unusual training loops once: skipped steps, checkpoints, long frozen layers, groups, copies."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kronfac as kf
from kronfac.approximations import Mean
from kronfac.optim import KFAC
from kronfac.tape import TapeError


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch(seed: int = 0, examples: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (examples,), generator=generator)


def optimizer_of(model: nn.Module, reduction: str = "batchmean", **options: object) -> KFAC:
    arguments = {"lr": 0.05, "stats_every": 1, "invert_every": 1, "kl_clip": None, "source": "exact"} | options
    return KFAC(model, kf.Categorical(reduction=reduction), **arguments)  # type: ignore[arg-type]


def step(model: nn.Module, optimizer: KFAC, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y, reduction="sum").backward()
    optimizer.step()


def trace(optimizer: KFAC) -> float:
    return float(optimizer.curvature().trace())


def test_an_earlier_state_is_not_changed_by_later_steps() -> None:
    model, data = perceptron(), batch()
    optimizer = optimizer_of(model)
    step(model, optimizer, *data)
    state, before = optimizer.state_dict(), trace(optimizer)
    for seed in range(1, 9):
        step(model, optimizer, *batch(seed))
    assert trace(optimizer) != before
    optimizer.load_state_dict(state)
    assert trace(optimizer) == before


@pytest.mark.parametrize("forward", ["shared", "own"])
@pytest.mark.parametrize("refused", [False, True])
def test_a_step_that_was_not_taken_is_no_part_of_the_next(refused: bool, forward: str) -> None:
    """GradScaler leaves steps out; a step may refuse its gradients. Sums of curvatures are of one step alone."""
    found = []
    for skips in (0, 2):
        model, data = perceptron(), batch()
        optimizer = optimizer_of(model, "sum", stats_forward=forward)
        for _ in range(skips):
            optimizer.zero_grad()
            F.cross_entropy(model(data[0]), data[1], reduction="sum").backward()
            if refused:
                assert model[0].weight.grad is not None
                model[0].weight.grad[0, 0] = float("nan")
                with pytest.raises(FloatingPointError):
                    optimizer.step()
        step(model, optimizer, *data)
        found.append(trace(optimizer))
    assert found[1] == pytest.approx(found[0], rel=1e-12)


def test_micro_batches_and_forwards_before_one_backward_still_add_up() -> None:
    whole, data = optimizer_of(model := perceptron(), "sum"), batch()
    step(model, whole, *data)

    def by_parts(twice_backward: bool, zero_after: bool) -> float:
        model = perceptron()
        optimizer = optimizer_of(model, "sum")
        if not zero_after:
            optimizer.zero_grad()
        losses = []
        for x, y in zip(data[0].split(8), data[1].split(8), strict=True):
            losses.append(F.cross_entropy(model(x), y, reduction="sum"))
            if zero_after and len(losses) == 1:
                optimizer.zero_grad()
            if twice_backward:
                losses[-1].backward()
        if not twice_backward:
            torch.stack(losses).sum().backward()
        optimizer.step()
        return trace(optimizer)

    for arguments in ((True, False), (True, True), (False, False), (False, True)):
        assert by_parts(*arguments) == pytest.approx(trace(whole), rel=1e-12), arguments


@pytest.mark.parametrize("source", ["exact", "recursive"])
def test_a_checkpoint_around_the_model_changes_no_statistic(source: str) -> None:
    found = []
    for around in (False, True):
        model, (x, y) = perceptron(), batch()
        optimizer = optimizer_of(model, source=source)
        for _ in range(2):
            optimizer.zero_grad()
            z = checkpoint(model, x, use_reentrant=False) if around else model(x)
            F.cross_entropy(z, y).backward()
            assert optimizer._gatherer.forwards == 1
            optimizer.step()
        found.append(trace(optimizer))
    assert found[1] == pytest.approx(found[0], rel=1e-12)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def test_warm_up_through_a_checkpoint_inside_the_model() -> None:
    found = []
    for wrap in (nn.Sequential, Checkpointed):
        model = wrap(perceptron())
        optimizer = optimizer_of(model)
        optimizer.warm_up([batch(0), batch(1)])
        found.append(trace(optimizer))
    assert found[1] == pytest.approx(found[0], rel=1e-12)


def test_capture_for_each_of_two_heads_is_refused() -> None:
    model, (x, _) = perceptron(), batch()
    optimizer = optimizer_of(model)
    with pytest.raises(TapeError, match="twice in one context"), optimizer.capture() as capture:  # noqa: PT012
        z = model(x)
        capture(z)
        capture(2 * z)


def test_capture_gathers_nothing_without_gradients() -> None:
    model, (x, _) = perceptron(), batch()
    optimizer = optimizer_of(model)
    with torch.no_grad(), optimizer.capture() as capture:
        capture(model(x))
    assert optimizer._gatherer.gathered == 0


def test_hooks_on_the_model_that_came_later_are_in_the_curvature() -> None:
    found = []
    for first in (True, False):
        model, data = perceptron(), batch()
        optimizer = None if first else optimizer_of(model)
        model.register_forward_hook(lambda _m, _a, z: 10 * z)
        optimizer = optimizer or optimizer_of(model)
        step(model, optimizer, *data)
        found.append(trace(optimizer))
    assert found[1] == pytest.approx(found[0], rel=1e-12)


def test_nothing_of_a_forward_stays_after_its_step() -> None:
    model, (x, y) = perceptron(), batch()
    optimizer = optimizer_of(model, stats_every=10)
    z = model(x)
    held = weakref.ref(z)
    F.cross_entropy(z, y).backward()
    optimizer.step()
    del z
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_to_which_nothing_is_added_stays_what_it_is(dtype: torch.dtype) -> None:
    mean = Mean(torch.zeros(3, dtype=dtype))
    mean.total.add_(torch.tensor([1.0, 1e-6, 1e6], dtype=dtype), alpha=mean.alpha)
    mean.weight = 2.0
    before = mean.value()
    for _ in range(20_000):
        mean.decay(0.5)
    torch.testing.assert_close(mean.value(), before, rtol=1e-6, atol=0.0)
    mean.total.add_(torch.ones(3, dtype=dtype), alpha=mean.alpha)
    mean.weight += 1.0
    torch.testing.assert_close(mean.value(), torch.ones(3, dtype=dtype))


def test_a_layer_frozen_for_long_does_not_stop_the_others() -> None:
    model, data = perceptron(), batch()
    optimizer = kf.optim.EKFAC(model, kf.Categorical(), lr=1e-6, stats_every=1, invert_every=1, ema=1e-30, kl_clip=None)
    step(model, optimizer, *data)
    before = optimizer._estimator.statistics["0"].block().to_dense()
    model[0].requires_grad_(False)
    for _ in range(60):
        step(model, optimizer, *data)
    torch.testing.assert_close(optimizer._estimator.statistics["0"].block().to_dense(), before)


def test_a_layer_in_two_groups_has_the_damping_of_its_weight() -> None:
    moved = []
    for reverse in (False, True):
        model, data = perceptron(), batch()
        weights = {"params": [model[0].weight, model[2].weight], "weight_decay": 0.5, "damping": 0.1}
        biases = {"params": [model[0].bias, model[2].bias], "weight_decay": 0.0, "damping": 0.3}
        groups = [weights, biases][:: -1 if reverse else 1]
        optimizer = optimizer_of(model, param_groups=groups)
        step(model, optimizer, *data)
        assert optimizer._damping("0") == pytest.approx(0.6)
        moved.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-14, atol=1e-14)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = perceptron(), nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


@pytest.mark.filterwarnings("ignore::kronfac.CoverageWarning")
def test_named_parameters_of_the_fallback_step_once() -> None:
    model, data = Scaled(), batch()
    groups = [{"params": list(model.named_parameters())}]
    fallback: Callable[..., torch.optim.Optimizer] = lambda ps: torch.optim.SGD(ps, lr=0.1)  # noqa: E731
    optimizer = optimizer_of(model, param_groups=groups, fallback=fallback)
    before = model.scale.detach().clone()
    step(model, optimizer, *data)
    assert model.scale.grad is not None
    torch.testing.assert_close(model.scale.detach(), before - 0.1 * model.scale.grad)


@pytest.mark.filterwarnings("ignore::kronfac.CoverageWarning")
def test_a_fallback_that_needs_a_closure_is_refused_at_construction() -> None:
    with pytest.raises(TypeError, match="LBFGS"):
        optimizer_of(Scaled(), fallback=torch.optim.LBFGS)


def test_parameters_unfrozen_later_are_named() -> None:
    model = perceptron()
    model[0].requires_grad_(False)
    optimizer = optimizer_of(model)
    model[0].requires_grad_(True)
    with pytest.warns(kf.CoverageWarning, match="0.weight, 0.bias"):
        optimizer.add_param_group({"params": list(model[0].parameters())})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer_of(perceptron())


def test_optimisers_are_neither_copied_nor_pickled() -> None:
    optimizer = optimizer_of(perceptron())
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="load_state_dict"):
            attempt(optimizer)


def test_a_model_that_was_cast_is_refused() -> None:
    model, (x, _) = perceptron(), batch()
    optimizer = optimizer_of(model)
    with pytest.raises(TapeError, match="cast or moved"):
        model.float()(x.float())
    assert optimizer._gatherer.gathered == 0
