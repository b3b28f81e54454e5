"""Statistics gathered by hand, before training, or not at all."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw
from tests.optim.gathering_helpers import LABELS, estimated, factors, hooks, make, same
from tests.optim.hand_kfac import network
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf


def test_capture_gathers_what_the_hook_would() -> None:
    model, twin, x = network(), network(), draw(8, 3)
    optimizer, other = make(model), make(twin)
    with optimizer.capture() as capture:
        capture(model(x))
    twin(x)
    same(factors(optimizer), factors(other), 0.0)
    assert optimizer._gatherer.gathered == 1


def test_capture_reads_parts_that_are_called_apart() -> None:
    model = nn.ModuleDict({"encoder": double(nn.Linear(3, 4)), "decoder": double(nn.Linear(4, 3))})
    optimizer = make(model)
    x = draw(8, 3)
    with optimizer.capture() as capture:
        z = model["decoder"](model["encoder"](x).tanh())
        capture(z)
    F.cross_entropy(z, LABELS).backward()
    before = copy.deepcopy(model)
    optimizer.step()
    assert not torch.equal(model["encoder"].weight, before["encoder"].weight)
    joined = nn.Sequential(before["encoder"], nn.Tanh(), before["decoder"])
    wanted = list(estimated(joined, (x, None)).values())
    for found, tensor in zip(factors(optimizer).values(), wanted, strict=True):
        torch.testing.assert_close(found, tensor)


@pytest.mark.parametrize("source", ["exact", "empirical", "sampled"])
def test_capture_takes_the_targets(source: str) -> None:
    """Where the forward hook cannot know them: ignored targets, class weights, the empirical Fisher."""
    likelihood = kf.Categorical(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), ignore_index=-100)
    model, x = network(), draw(8, 3)
    y = torch.tensor([0, -100, 1, 2, -100, 2, 1, 0])
    optimizer = make(model, likelihood=likelihood, source=source)
    with pytest.raises(kf.TapeError, match=r"needs the targets[\s\S]*optimizer\.capture\(\)[\s\S]*capture\(z, y\)"):
        model(x)
    assert hooks(model) == 2
    with optimizer.capture() as capture:
        z = model(x)
        capture(z, y)
    F.cross_entropy(z, y, likelihood.weight).backward()
    found = factors(optimizer)
    options = {} if source != "sampled" else {"seed": 0}
    wanted = kf.estimate(model, likelihood, (x, y), source=source, **options).blocks
    for name, block in wanted.items():
        for key, tensor in block.tensors().items():
            torch.testing.assert_close(found[f"{name}.{key}"], tensor)
    garbage = x.clone()
    garbage[y == -100] = 1e3
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    other = make(network(), likelihood=likelihood)
    with other.capture() as capture:
        capture(other._gatherer.root(garbage), y)
    same(factors(other), estimated(network(), (x, y), likelihood=likelihood))


def test_capture_between_due_steps_does_nothing() -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model, stats_every=5, burn_in=0)
    for _ in range(2):
        optimizer.zero_grad()
        with optimizer.capture() as capture:
            z = model(x)
            capture(z)
        F.cross_entropy(z, LABELS).backward()
        optimizer.step()
    before = factors(optimizer)
    with optimizer.capture() as capture:
        capture(model(draw(8, 3, seed=3)))
    same(factors(optimizer), before, 0.0)


def test_capture_of_several_micro_batches() -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model, ema=0.5)
    for part in x.split(4):
        with optimizer.capture() as capture:
            capture(model(part))
    same(factors(optimizer), estimated(model, (x, None)))


def test_outputs_that_are_no_tensor() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.layers(x)}

    model, x = Wrapped(), draw(8, 3)
    optimizer = make(model)
    with pytest.raises(TypeError, match=r"of type dict.*outputs=lambda out: out\.logits"):
        model(x)
    del optimizer
    gc.collect()
    optimizer = make(model, outputs=lambda out: out["logits"], kl_clip=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x)["logits"], LABELS).backward()
        optimizer.step()


def test_warm_up_is_a_plain_mean_that_the_first_step_forgets_once() -> None:
    model, x = network(), draw(12, 3)
    optimizer = make(model, ema=0.25)
    parts = [(part, None) for part in x.split([5, 4, 3])]
    optimizer.warm_up(parts)
    whole = estimated(model, (x, None))
    same(factors(optimizer), whole)
    later = draw(6, 3, seed=1)
    F.cross_entropy(model(later), LABELS[:6]).backward()
    new = estimated(model, (later, None))
    # Equation 33: of the three batches of four, 1/(1 − 0.25) count, a quarter of which is left beside the new six.
    old, fresh = 0.25 * 4 / 0.75, 6
    wanted = {name: (old * whole[name] + fresh * new[name]) / (old + fresh) for name in whole}
    same(factors(optimizer), wanted)
    optimizer.step()
    with pytest.raises(RuntimeError, match="before the first step"):
        optimizer.warm_up(parts)


def test_after_a_long_warm_up_the_average_forgets_as_fast_as_ever() -> None:
    model, x, later = network(), draw(12, 3), draw(4, 3, seed=1)
    optimizer = make(model, ema=0.9)
    batches = [(part, None) for part in x.split(4)] * 10
    optimizer.warm_up(batches[:7])
    optimizer.warm_up(batches[7:])  # as if it had been one
    old, new = estimated(model, (x, None)), estimated(model, (later, None))
    same(factors(optimizer), old)
    F.cross_entropy(model(later), LABELS[:4]).backward()
    same(factors(optimizer), {name: 0.9 * old[name] + 0.1 * new[name] for name in old})


def test_a_loader_that_fails_leaves_a_warm_up_of_the_batches_before() -> None:
    x = draw(12, 3)
    batches = [(part, None) for part in x.split(4)] * 4

    def failing() -> Iterator[tuple[Tensor, None]]:
        yield from batches[8:]
        raise OSError("the disk is gone")

    weights = []
    for loader in (batches[8:], failing()):
        optimizer = make(network(), ema=0.5)
        optimizer.warm_up(batches[:8])
        with contextlib.suppress(OSError):
            optimizer.warm_up(loader)
        weights.append([m.weight for s in optimizer._estimator.statistics.values() for m in s.means().values()])
    assert weights[0] == pytest.approx(weights[1], rel=1e-12)


def test_warm_up_takes_targets_counts_batches_and_leaves_the_model() -> None:
    model = double(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    likelihood = kf.Categorical(ignore_index=-100)
    optimizer = make(model, likelihood=likelihood, source="sampled")
    state = copy.deepcopy(model.state_dict())
    seen = []

    def loader() -> Any:
        for index in range(5):
            seen.append(index)
            yield draw(8, 3, seed=index), LABELS

    optimizer.warm_up(loader(), batches=2)
    assert len(seen) <= 3
    assert optimizer._estimator.statistics["0"].means()["input"].weight == 16.0
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_step_after_warm_up_needs_no_statistics_of_its_own() -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model)
    optimizer.warm_up((x, LABELS))
    with optimizer.paused():
        F.cross_entropy(model(x), LABELS).backward()
    optimizer.step()


def never(model: nn.Module, optimizer: kf.optim.KFAC, x: Tensor) -> Tensor:
    value = x
    for layer in model:
        value = layer(value)
    return value


def evaluated(model: nn.Module, optimizer: kf.optim.KFAC, x: Tensor) -> Tensor:
    return model.eval()(x)


def paused(model: nn.Module, optimizer: kf.optim.KFAC, x: Tensor) -> Tensor:
    with optimizer.paused():
        return model(x)


def functional(model: nn.Module, optimizer: kf.optim.KFAC, x: Tensor) -> Tensor:
    return model.forward(x)


@pytest.mark.parametrize("call", [never, evaluated, paused, functional])
def test_a_loop_that_never_calls_the_model_is_told(call: Any) -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model)
    before = copy.deepcopy(model)
    F.cross_entropy(call(model, optimizer, x), LABELS).backward()
    with pytest.raises(RuntimeError, match=r"no forward of the model passed to KFAC was seen[\s\S]*capture\(z\)"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


def test_a_layer_that_is_never_called_is_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = double(nn.Linear(3, 3)), double(nn.Linear(3, 3))

        def forward(self, x: Tensor, both: bool = False) -> Tensor:
            return self.used(x) + (self.idle(x) if both else 0.0)

    model, x = Model(), draw(8, 3)
    optimizer = make(model, stats_every=100, burn_in=0)
    F.cross_entropy(model(x), LABELS).backward()
    optimizer.step()  # without gradient it just stays
    before = copy.deepcopy(model)
    F.cross_entropy(model(x, both=True), LABELS).backward()
    with pytest.raises(RuntimeError, match="Layer 'idle' has a gradient but no inverse"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


def test_a_forward_that_calls_no_layer_is_told() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = double(nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.layer.weight, self.layer.bias)

    model = Bare()
    optimizer = make(model)
    with pytest.raises(kf.TapeError, match="No layer hook fired"):
        model(draw(8, 3))
    assert hooks(model) == 2
    assert optimizer._gatherer.gathered == 0


def test_other_optimisers_of_the_model_hear_of_a_captured_forward() -> None:
    model, x = network(), draw(8, 3)
    by_hand, again, by_hook = make(model), make(model), make(model)
    with by_hand.capture() as capture, again.capture() as second:
        z = model(x)
        capture(z)
        second(z)
    wanted = estimated(network(), (x, None))
    for optimizer in (by_hand, again, by_hook):
        same(factors(optimizer), wanted)
        assert optimizer._gatherer.gathered == 1


def test_an_estimate_within_capture_is_apart_from_it() -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model)
    with optimizer.capture() as capture:
        z = model(x)
        estimated(model, (draw(8, 3, seed=1), None))
        capture(z)
    same(factors(optimizer), estimated(network(), (x, None)))


def test_targets_made_under_no_grad_are_not_what_the_clip_looks_at() -> None:
    """A bootstrapped target of reinforcement learning, made between the forward and capture."""
    model, x = network(), draw(8, 3)
    optimizer = make(model, kl_clip=1e-3)
    with optimizer.capture() as capture:
        z = model(x)
        with torch.no_grad():
            model(10 * x)
        capture(z, LABELS)
    F.cross_entropy(z, LABELS).backward()
    assert optimizer._gatherer.last is not None
    assert optimizer._gatherer.last[0][0] is x
    optimizer.step()
    twin = network()
    other = make(twin, kl_clip=1e-3)
    F.cross_entropy(twin(x), LABELS).backward()
    other.step()
    assert optimizer._clip.scale == other._clip.scale < 1
