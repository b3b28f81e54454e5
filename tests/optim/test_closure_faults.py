"""Optimisers with a closure, and KLD-WRM, when something fails or changes: errors, groups, frozen layers, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.exactness_helpers import draw, relative
from tests.optim.hand_kfac import network
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf

KINDS = ["AdaptiveKFAC", "HessianFree", "KFLR", "KFRA"]
LABELS = torch.arange(24) % 3
INPUTS = draw(24, 3)


class Evaluations:
    """The loss as a closure that raises at one of its evaluations, counted from 1, after its forward."""

    def __init__(self, model: nn.Module, at: int, error: type[BaseException], factor: Callable[[], Any] | None = None):
        self.model, self.at, self.error, self.factor, self.count = model, at, error, factor, 0

    def __call__(self) -> Tensor:
        self.count += 1
        loss = F.cross_entropy(self.model(INPUTS), LABELS)
        if self.count == self.at:
            raise self.error("from the closure")
        return loss if self.factor is None else loss * self.factor()


def copies(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(model: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def train(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int) -> list[float]:
    return [float(optimizer.step(lambda: F.cross_entropy(model(INPUTS), LABELS))) for _ in range(steps)]


def make(kind: str, model: nn.Module, **options: Any) -> kf.optim.AdaptiveKFAC:
    if kind in ("AdaptiveKFAC", "HessianFree"):
        options = {"source": "exact", **options}
    found = getattr(kf.optim, kind)(model, kf.Categorical(), **options)
    assert isinstance(found, kf.optim.AdaptiveKFAC)
    return found


# -------------------------------------------------------------------- closures that raise
@pytest.mark.parametrize(
    ("damping", "at", "error"),
    [
        (1.0, 1, ValueError),
        (1.0, 2, ValueError),
        (1.0, 3, ValueError),
        *(("auto", k, KeyboardInterrupt) for k in (4, 11)),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_closure_that_raises_leaves_everything(kind: str, damping: Any, at: int, error: type[BaseException]) -> None:
    """At the gradient, the second look, a trial, within the calibration and at the trial after it."""
    undisturbed = network()
    train(make(kind, undisturbed, damping=damping), undisturbed, 1)
    model = network()
    optimizer, before, closure = make(kind, model, damping=damping), copies(model), Evaluations(model, at, error)
    with pytest.raises(error, match="from the closure"):
        optimizer.step(closure)
    assert same(model, before)
    assert optimizer._calibrates == (damping == "auto")
    # The statistics of the first mini-batch are now a mean of it and itself.
    train(optimizer, model, 1)
    for found, wanted in zip(model.parameters(), undisturbed.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("bad", "at"), [("infinite", 2), ("infinite", 3), ("high", 2), ("high", 3)])
def test_a_closure_that_raises_once_the_last_step_was_taken_back(bad: str, at: int) -> None:
    """Where the loss blew up since, or is high for this mini-batch alone."""
    model = network()
    optimizer = make("AdaptiveKFAC", model, damping=0.1, adapt_every=50)
    train(optimizer, model, 8)
    for parameter in model.parameters():
        previous = optimizer.state[parameter]["previous"].fill_(100.3)
        parameter.data.add_(previous)
    before, lam = copies(model), optimizer._lam.value

    def factor() -> float:
        far = float(model[0].weight.detach().abs().max()) > 50.0
        return float("inf") if far and bad == "infinite" else 1.0

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(Evaluations(model, at, KeyboardInterrupt, factor))
    assert same(model, before)
    assert optimizer._lam.value == lam
    assert all(bool((optimizer.state[p]["previous"] == 100.3).all()) for p in model.parameters())


def test_a_hard_mini_batch_takes_no_step_back() -> None:
    """The parameters are then those of before to the last bit, when the closure raises later on."""
    model = network()
    optimizer = make("AdaptiveKFAC", model, damping=0.1, adapt_every=2)
    train(optimizer, model, 8)
    optimizer._unchecked, before = 1e-9, copies(model)
    for parameter in model.parameters():
        optimizer.state[parameter]["previous"].fill_(1e6 + 0.3)  # to go there and back would lose digits
    hard = Evaluations(model, 3, ValueError, lambda: 1.0 if hard.count == 1 else 2.0)
    with pytest.raises(ValueError, match="from the closure"):
        optimizer.step(hard)
    assert same(model, before)


def test_a_closure_that_raises_after_rejections_leaves_the_damping() -> None:
    model = network()
    optimizer, before = make("AdaptiveKFAC", model, damping=1.0), copies(model)
    closure = Evaluations(model, 5, ValueError, lambda: 1.0 if same(model, before) else 1e3)
    with pytest.raises(ValueError, match="from the closure"):
        optimizer.step(closure)
    assert same(model, before)
    assert (optimizer._lam.value, optimizer._lam.streak) == (1.0, 0)


def test_an_interrupted_forward_enters_no_later_step() -> None:
    """Ctrl-C in a closure of KLD-WRM: what was gathered is dropped."""
    model = network()
    optimizer = kf.optim.KLDWRM(model, kf.Categorical(), source="exact", kl_clip=None)

    def interrupted() -> Tensor:
        F.cross_entropy(model(10.0 * INPUTS), LABELS).backward()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(interrupted)
    assert optimizer._gatherer.gathered == 0


# -------------------------------------------------------------------- groups
@pytest.mark.parametrize(
    "own",
    [{"weight_decay": 5.0}, {"lr": 7.0}, {"damping": 3.0}, {"momentum": 0.5}, {"kl_clip": 0.1}],
    ids=lambda own: next(iter(own)),
)
@pytest.mark.filterwarnings("ignore::kronfac.estimator.CoverageWarning")  # the layer was frozen at construction
@pytest.mark.parametrize("kind", KINDS)
def test_groups_have_no_settings_of_their_own(kind: str, own: dict[str, float]) -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = make(kind, model)
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match=next(iter(own))):
        optimizer.add_param_group({"params": list(model[0].parameters()), **own})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": list(model[0].parameters()), "weight_decay": 0.0})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("schedule", ["StepLR", "OneCycleLR"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scheduler_is_told_that_it_has_no_effect(kind: str, schedule: str) -> None:
    model = network()
    optimizer = make(kind, model)
    if schedule == "StepLR":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        train(optimizer, model, 1)
        scheduler.step()
    else:
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 5.0, 10)  # the momentum, too
    before = copies(model)
    with pytest.raises(ValueError, match=r"chooses its own step size.*lr=.*no effect.*scheduler"):
        train(optimizer, model, 1)
    assert same(model, before)


def test_a_state_does_not_change_settings_that_the_constructor_fixes() -> None:
    models = [network() for _ in range(2)]
    first, second = make("AdaptiveKFAC", models[0], damping=3.0), make("AdaptiveKFAC", models[1], damping=7.0)
    train(first, models[0], 2)
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(first.state_dict())
    for optimizer, model in zip((first, second), models, strict=True):
        train(optimizer, model, 2)
    assert same(models[0], copies(models[1]))
    assert second.param_groups[0]["damping"] == 7.0


# -------------------------------------------------------------------- frozen layers
@pytest.mark.parametrize("taken", [0, 3])
@pytest.mark.parametrize(
    ("kind", "options"),
    [*((kind, {}) for kind in KINDS), ("HessianFree", {"block_diagonal": True}), ("AdaptiveKFAC", {"average": 0.9})],
)
def test_a_layer_is_frozen_and_thawed_while_training(kind: str, options: dict[str, Any], taken: int) -> None:
    model = network()
    optimizer = make(kind, model, **options)
    losses = train(optimizer, model, taken)
    model[0].requires_grad_(False)
    before = copies(model)
    losses += train(optimizer, model, 5)
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert moved == [parameter.requires_grad for parameter in model.parameters()]
    model[0].requires_grad_(True)
    before = copies(model)
    losses += train(optimizer, model, 4)
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert losses == sorted(losses, reverse=True)


def test_the_step_beside_a_frozen_layer_is_that_of_the_others_alone() -> None:
    model = network()
    optimizer = make("HessianFree", model, damping=0.5, precondition=False, tolerance=1e-12, progress=1e-14)
    train(optimizer, model, 3)
    model[0].requires_grad_(False)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    matrix = kf.GaussNewtonOperator(model, kf.Categorical(), [(INPUTS, LABELS)], parameters=names).to_dense()
    loss = F.cross_entropy(model(INPUTS), LABELS)
    free = [model.get_parameter(name) for name in names]
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(loss, free)])
    before = torch.cat([p.detach().flatten() for p in free])
    train(optimizer, model, 1)
    assert optimizer.report is not None
    wanted = -torch.linalg.solve(matrix + optimizer.report.lam * torch.eye(len(matrix)).double(), slope)
    assert relative(torch.cat([p.detach().flatten() for p in free]) - before, wanted) < 1e-6


@pytest.mark.filterwarnings("ignore::kronfac.estimator.CoverageWarning")
def test_a_layer_that_was_thawed_and_not_added_is_named_and_stands_still_where_groups_were_given() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer, plain = make("HessianFree", model), kf.optim.KFAC(model, kf.Categorical(), lr=0.1)
    groups = [{"params": list(model[2].parameters())}]
    own = kf.optim.KFAC(model, kf.Categorical(), lr=0.1, stats_every=1, param_groups=groups)
    model[0].requires_grad_(True)
    before = copies(model[0])
    with pytest.raises(RuntimeError, match=r"0\.weight, 0\.bias were frozen when the optimiser was constructed"):
        train(optimizer, model, 1)
    F.cross_entropy(model(INPUTS), LABELS).backward()
    with pytest.raises(RuntimeError, match=r"0\.weight, 0\.bias were frozen"):
        plain.step()
    loss = F.cross_entropy(model(INPUTS), LABELS)
    own.zero_grad()
    loss.backward()
    own.step()
    assert same(model[0], before)
    assert F.cross_entropy(model(INPUTS), LABELS) < loss


def test_freezing_forgets_a_step_in_more_parameters() -> None:
    model = network()
    optimizer = make("AdaptiveKFAC", model, adapt_every=50)
    train(optimizer, model, 8)
    model[0].requires_grad_(False)
    train(optimizer, model, 1)
    assert optimizer.report is not None
    assert optimizer.report.mu == 0.0
    assert optimizer.report.rho is not None  # looked at again
    train(optimizer, model, 1)
    assert optimizer.report.mu != 0.0
    model[0].requires_grad_(True)
    train(optimizer, model, 1)
    assert optimizer.report.mu == 0.0


def test_what_is_frozen_stays_in_the_average() -> None:
    model = network()
    optimizer = make("AdaptiveKFAC", model, average=0.5)
    train(optimizer, model, 3)
    model[0].requires_grad_(False)
    weight = model[0].weight.detach()
    wanted = optimizer.state[model[0].weight]["average"].lerp(weight, 0.5)
    train(optimizer, model, 1)
    torch.testing.assert_close(optimizer.state[model[0].weight]["average"], wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [*KINDS, "KLDWRM"])
def test_nothing_is_left_to_train(kind: str) -> None:
    model = network()
    qe = {"variant": "qe"} if kind == "KLDWRM" else {}
    optimizer = getattr(kf.optim, kind)(model, kf.Categorical(), **qe)
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="All parameters are frozen"):
        train(optimizer, model, 1)


# -------------------------------------------------------------------- the wake of what stands still
class Two(nn.Module):
    """A sum of two layers, one of which may be left out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.both = nn.Linear(3, 3), nn.Linear(3, 3), True
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(torch.sin(x)) if self.both else self.first(x)


def wakes(variant: str, model: nn.Module, **options: Any) -> tuple[kf.optim.KLDWRM, Callable[[], None]]:
    """An optimiser with dense curvature, and what takes a step."""
    optimizer = kf.optim.KLDWRM(
        model, kf.Categorical(), 3.0, variant=variant, approximation="dense", source="exact", damping=0.1,
        stats_every=1, kl_clip=None, **options,
    )  # fmt: skip

    def step() -> None:
        if variant == "qe":
            train(optimizer, model, 1)
            return
        optimizer.zero_grad()
        F.cross_entropy(model(INPUTS), LABELS).backward()
        optimizer.step()

    return optimizer, step


@pytest.mark.parametrize("variant", ["so", "q", "qe"])
def test_the_wake_of_a_frozen_layer_decays(variant: str) -> None:
    model = Two()
    optimizer, step = wakes(variant, model, rho=0.6)
    for _ in range(3):
        step()
    before = {p: optimizer.state[p]["wake"].clone() for p in model.second.parameters()}
    start = copies(model.second)
    model.second.requires_grad_(False)
    for parameter in model.second.parameters():
        parameter.grad = torch.ones_like(parameter) if variant == "qe" else None  # the closure's are the only ones
    for _ in range(4):
        step()
    assert same(model.second, start)
    for parameter, wake in before.items():
        torch.testing.assert_close(optimizer.state[parameter]["wake"], 0.6**4 * wake, rtol=1e-12, atol=0)


@pytest.mark.parametrize("variant", ["so", "q"])
def test_the_wake_of_an_unused_layer_decays(variant: str) -> None:
    model = Two()
    optimizer, step = wakes(variant, model)
    for _ in range(3):
        step()
    before = {p: optimizer.state[p]["wake"].clone() for p in model.second.parameters()}
    model.both = False
    step()
    for parameter, wake in before.items():
        torch.testing.assert_close(optimizer.state[parameter]["wake"], 0.5 * wake, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("variant", "momentum"), [("so", 0.0), ("so", 0.5), ("q", 0.0), ("q", 0.5), ("qe", 0.0)])
def test_the_wake_of_a_frozen_weight_hears_of_its_bias(variant: str, momentum: float) -> None:
    """``u ← ρ u + F̄ s`` with the whole matrix of the layer."""
    model = Two()
    optimizer, step = wakes(variant, model, momentum=momentum)
    step()
    layer = model.second
    layer.weight.requires_grad_(False)
    for _ in range(3):
        wake = torch.cat([optimizer.state[p]["wake"].flatten() for p in layer.parameters()])
        start = copies(layer)
        step()
        moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(layer.parameters(), start, strict=True)])
        average = optimizer.curvature().blocks["second"].to_dense()
        packed = optimizer._estimator.adaptation.adapters["second"].pack
        names = {"second.weight": moved[:9].view(3, 3), "second.bias": moved[9:]}
        product = (average + 0.1 * torch.eye(12).double()) @ packed(names).flatten()
        unpacked = optimizer._estimator.adaptation.adapters["second"].unpack(product.view(3, 4))
        wanted = 0.5 * wake + torch.cat([unpacked[name].flatten() for name in names])
        assert float(moved[:9].abs().max()) == 0.0
        found = torch.cat([optimizer.state[p]["wake"].flatten() for p in layer.parameters()])
        assert relative(found, wanted) < 1e-9


def test_networks_before_keep_what_is_frozen_now() -> None:
    model = network()
    optimizer, step = wakes("qe", model)
    step()
    model[0].requires_grad_(False)
    step()
    assert all(kept.keys() == dict(model.named_parameters()).keys() for _, kept in optimizer._networks.kept)


# -------------------------------------------------------------------- captured targets, and inputs of 16 bits
@pytest.mark.parametrize("kind", KINDS[:3])
def test_targets_are_captured_within_the_closure(kind: str) -> None:
    """Trials evaluate it without gradients, where there is nothing to gather."""
    model, labels = network(), LABELS.clone()
    labels[5:9] = -100
    optimizer = getattr(kf.optim, kind)(model, kf.Categorical(ignore_index=-100))

    def closure() -> Tensor:
        with optimizer.capture() as capture:
            outputs = model(INPUTS)
            capture(outputs, labels)
        return F.cross_entropy(outputs, labels)

    losses = [float(optimizer.step(closure)) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("kind", "options"),
    [*((kind, {"damping": 1.0}) for kind in KINDS[:3]), ("KLDWRM", {"variant": "qe", "kl_clip": None})],
)
def test_inputs_of_16_bits_are_those_of_32(kind: str, options: dict[str, Any]) -> None:
    """Autocast rounds both alike in the closure, and outside of it products are those of the parameters' dtype."""

    def losses(inputs: Tensor) -> list[float]:
        model = network().float()
        optimizer = getattr(kf.optim, kind)(model, kf.Categorical(), **options)

        def closure() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return F.cross_entropy(model(inputs), LABELS)

        return [float(optimizer.step(closure)) for _ in range(3)]

    rounded = INPUTS.to(torch.bfloat16)
    assert losses(rounded) == losses(rounded.float())
