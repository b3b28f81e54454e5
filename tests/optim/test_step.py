"""The step of ``KFAC`` against KFAC written down by hand, and against closed forms."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw
from tests.optim.hand_kfac import HandKFAC, network
from tests.optim.unclipped import unclipped
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf

STEPS = 6


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    y = torch.randint(3, (size,), generator=torch.Generator().manual_seed(step))
    return draw(size, 3, seed=100 + step), y


def train(model: nn.Module, optimizer: kf.optim.KFAC, steps: int = STEPS, first: int = 0) -> None:
    for step in range(first, first + steps):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def close(model: nn.Module, other: nn.Module, tolerance: float = 1e-9) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------------------------------------------- by hand
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"momentum": 0.0},
    "momentum": {},
    "exact damping": {"damping_rule": "exact", "damping": 0.02},
    "factored damping": {"damping": 0.3},
    "weight decay": {"weight_decay": 0.1, "damping": 0.05},
    "weight decay, exact": {"weight_decay": 0.1, "damping": 0.05, "damping_rule": "exact"},
    "decoupled weight decay": {"weight_decay": 0.1, "damping": 0.05, "decoupled_weight_decay": True},
    "short memory": {"ema": 0.3},
    "no memory": {"ema": 0.0},
    "sampled": {"source": "sampled", "damping": 0.05},
    "clipped": {"kl_clip": 1e-4, "damping": 0.05},
    "clipped, weight decay": {"kl_clip": 1e-4, "damping": 0.05, "weight_decay": 0.2},
    "clipped, decoupled": {"kl_clip": 1e-4, "damping": 0.05, "weight_decay": 0.2, "decoupled_weight_decay": True},
    "bound never reached": {"kl_clip": 1e6, "damping": 0.05},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_several_steps_equal_those_by_hand(case: str) -> None:
    """Statistics and inverses on each step; every number of the loop must agree for the parameters to."""
    options = {"source": "exact", **OPTIONS[case]}
    model = network()
    twin = copy.deepcopy(model)
    optimizer = unclipped(model, kf.Categorical(), lr=0.05, stats_every=1, invert_every=1, **options)
    by_hand = {key: value for key, value in options.items() if key not in ("damping_rule", "decoupled_weight_decay")}
    hand = HandKFAC(
        twin,
        kf.Categorical(),
        lr=0.05,
        exact_damping=options.get("damping_rule") == "exact",
        decoupled=options.get("decoupled_weight_decay", False),
        **by_hand,
    )
    scales = []
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        twin.zero_grad()
        hand.decay()
        hand.gather(x)
        F.cross_entropy(twin(x), y).backward()
        hand.invert()
        hand.step(clip_on=x[:2])
        scales.append(hand.scale)
        close(model, twin)
    assert not torch.equal(model[0].weight, network()[0].weight)
    if "kl_clip" in options:
        assert all((scale < 1) == (options["kl_clip"] < 1) for scale in scales)


def test_periods_of_statistics_and_inverses() -> None:
    """Statistics on the burn-in and then every fourth step; inverses at 0, 1, 2, 4 and then every sixth."""
    model = network()
    twin = copy.deepcopy(model)
    optimizer = unclipped(
        model, kf.Categorical(), lr=0.05, damping=0.1, source="exact", stats_every=4, invert_every=6, burn_in=2
    )
    hand = HandKFAC(twin, kf.Categorical(), lr=0.05, damping=0.1)
    for step in range(14):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        twin.zero_grad()
        if step in (0, 1, 4, 8, 12):
            hand.decay()
            hand.gather(x)
        F.cross_entropy(twin(x), y).backward()
        if step in (0, 1, 2, 4, 6, 12):
            hand.invert()
        hand.step()
        close(model, twin)


def test_between_exact_products_the_clip_uses_their_last_ratio() -> None:
    model = network()
    optimizer = unclipped(
        model, kf.Categorical(), lr=0.5, damping=0.1, kl_clip=1e-4, momentum=0.0, stats_every=100, burn_in=1
    )
    train(model, optimizer, 1)
    ratio = optimizer._clip.ratio
    assert ratio is not None
    for step in range(1, 4):
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()
        move = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
        # vᵀF̂v of the clipped update is lr gᵀ of it, times the factor of clipping.
        approximate = -float(gradient @ move) * 0.5 / optimizer._clip.scale
        assert optimizer._clip.ratio == ratio
        assert optimizer._clip.last == pytest.approx(ratio * approximate)
        assert optimizer._clip.scale == pytest.approx((1e-4 / optimizer._clip.last) ** 0.5)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_the_clip_knows_the_reduction(reduction: str) -> None:
    """On equal examples a quarter of the batch says all, whatever the loss divides by."""
    model = network()
    likelihood = kf.Categorical(reduction=reduction)
    x, y = draw(1, 3).repeat(8, 1), torch.ones(8, dtype=torch.long)
    wanted = kf.reference.ggn(model, likelihood, x)
    optimizer = unclipped(model, likelihood, lr=0.3, damping=0.1, kl_clip=1e-6, momentum=0.0)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    likelihood.loss(model(x), y).backward()
    optimizer.step()
    move = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert float(move @ wanted @ move) == pytest.approx(1e-6, rel=1e-9)


@pytest.mark.parametrize("mask", [None, torch.tensor([1.0, 0.5] * 4)])
def test_the_clip_with_weights_that_need_targets(mask: Tensor | None) -> None:
    model, x = network(), draw(8, 3)
    y = torch.tensor([0, 1, 0, 1, 2, 2, 2, 2])
    targets = y if mask is None else (y, mask)
    likelihood = kf.Categorical(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64))
    wanted = kf.reference.ggn(model, likelihood, x[:2], y[:2] if mask is None else (y[:2], mask[:2]))
    optimizer = unclipped(model, likelihood, lr=0.3, damping=0.1, kl_clip=1e-6, momentum=0.0)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    with optimizer.capture() as capture:
        z = model(x)
        capture(z, targets)
    likelihood.loss(z, targets).backward()
    optimizer.step()
    move = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert float(move @ wanted @ move) == pytest.approx(1e-6, rel=1e-9)


# ---------------------------------------------------------------------------------------------------- closed forms
@pytest.mark.parametrize("rule", ["factored", "exact"])
@pytest.mark.parametrize("approximation", ["kfac", "dense"])
def test_one_step_solves_least_squares(rule: str, approximation: str) -> None:
    """On a linear-Gaussian problem KFAC is the Newton matrix: one undamped step of rate 1 ends at the optimum."""
    x, y = draw(20, 4), draw(20, 3, seed=1)
    model = double(nn.Linear(4, 3))
    optimizer = unclipped(
        model,
        kf.Gaussian(0.5, "mean"),
        lr=1.0,
        momentum=0.0,
        damping=1e-20,
        source="exact",
        damping_rule=rule,
        approximation=approximation,
    )
    F.mse_loss(model(x), y).backward()
    optimizer.step()
    rows = torch.cat((x, torch.ones(20, 1, dtype=torch.float64)), 1)
    wanted = torch.linalg.lstsq(rows, y).solution.T
    torch.testing.assert_close(torch.cat((model.weight, model.bias[:, None]), 1).detach(), wanted, rtol=1e-6, atol=1e-7)


def test_a_step_is_the_natural_gradient_where_kfac_is_exact() -> None:
    """One layer, one datum repeated: against the oracle's Fisher with damping."""
    model, x = double(nn.Linear(4, 3)), draw(1, 4)
    y = torch.tensor([1])
    damped = kf.reference.fisher(model, kf.Categorical(), x) + 0.1 * torch.eye(15, dtype=torch.float64)
    optimizer = unclipped(
        model, kf.Categorical(), lr=0.2, momentum=0.0, damping=0.1, source="exact", damping_rule="exact"
    )
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    F.cross_entropy(model(x), y).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.step()
    move = torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before
    torch.testing.assert_close(move, -0.2 * torch.linalg.solve(damped, gradient), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("approximation", ["kfac", "diagonal", "dense"])
@pytest.mark.parametrize("rule", ["factored", "exact"])
def test_the_direction_is_that_of_the_curvature_operator(approximation: str, rule: str) -> None:
    """For every kind of layer; the operator's inverse has tests of its own."""
    model = double(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.Conv2d(4, 4, 3, groups=2, bias=False),
            nn.ConvTranspose2d(4, 2, 2, stride=2),
            nn.Tanh(),
            nn.Flatten(2),
            nn.Linear(16, 5),
            nn.LayerNorm(5),
            nn.Flatten(),
            nn.Linear(10, 3),
        )
    )
    model[7].weight.requires_grad_(False)
    optimizer = unclipped(
        model, kf.Categorical(), lr=0.1, momentum=0.0, damping=0.2, approximation=approximation, damping_rule=rule
    )
    x, y = draw(5, 2, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    F.cross_entropy(model(x), y).backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = optimizer.curvature().factorise(0.2, rule).apply(gradient)
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name == "7.weight":
            assert torch.equal(parameter, before[name])
        else:
            torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * wanted[name], rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------------------------------------------- groups
def test_groups_have_their_own_numbers() -> None:
    model = network()
    twins = [copy.deepcopy(model) for _ in range(2)]
    groups = [
        {"params": model[0].parameters(), "lr": 0.2, "damping": 0.5, "momentum": 0.5},
        {"params": [*model[2].parameters(), *model[4].parameters()], "weight_decay": 0.1},
    ]
    optimizer = unclipped(model, kf.Categorical(), lr=0.05, damping=0.1, source="exact", param_groups=groups)
    first = unclipped(twins[0], kf.Categorical(), lr=0.2, damping=0.5, momentum=0.5, source="exact")
    rest = unclipped(twins[1], kf.Categorical(), lr=0.05, damping=0.1, weight_decay=0.1, source="exact")
    for m, o in ((model, optimizer), (twins[0], first), (twins[1], rest)):
        train(m, o, 1)
    for index, twin in ((0, twins[0]), (2, twins[1]), (4, twins[1])):
        assert torch.equal(model[index].weight, twin[index].weight)
        assert torch.equal(model[index].bias, twin[index].bias)


def test_parameters_outside_all_groups_are_not_trained() -> None:
    model = network()
    optimizer = unclipped(model, kf.Categorical(), lr=0.1, param_groups=[{"params": [model[0].weight]}])
    before = copy.deepcopy(model)
    train(model, optimizer, 2)
    assert not torch.equal(model[0].weight, before[0].weight)
    assert torch.equal(model[0].bias, before[0].bias)
    assert torch.equal(model[4].weight, before[4].weight)


def test_groups_may_be_added_later() -> None:
    model = network()
    optimizer = unclipped(model, kf.Categorical(), lr=0.1, param_groups=[{"params": model[0].parameters()}])
    train(model, optimizer, 1)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.01})
    before = copy.deepcopy(model)
    train(model, optimizer, 1)
    assert not torch.equal(model[2].weight, before[2].weight)
    with pytest.raises(ValueError, match="no parameters of the model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError, match="lr=-1"):
        optimizer.add_param_group({"params": model[4].parameters(), "lr": -1.0})
    assert len(optimizer.param_groups) == 2


# ---------------------------------------------------------------------------------------------------- conventions
def test_schedulers_change_the_rate() -> None:
    moves: list[float] = []
    model = network()
    optimizer = unclipped(model, kf.Categorical(), lr=0.1, momentum=0.0, ema=0.0, source="exact", stats_every=1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    start = copy.deepcopy(model.state_dict())
    for _ in range(3):
        model.load_state_dict(start)
        train(model, optimizer, 1)
        moves.append(float((model[0].weight.detach() - start["0.weight"]).norm()))
        scheduler.step()
    assert moves[1] == pytest.approx(moves[0] / 10, rel=1e-2)
    assert moves[2] == pytest.approx(moves[0] / 100, rel=1e-2)
    assert scheduler.get_last_lr() == [pytest.approx(1e-4)]


def test_one_cycle_cycles_the_momentum() -> None:
    model = network()
    optimizer = unclipped(model, kf.Categorical(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    momenta = []
    for step in range(8):
        train(model, optimizer, 1, first=step)
        momenta.append(optimizer.param_groups[0]["momentum"])
        scheduler.step()
    assert min(momenta) < 0.88
    assert max(momenta) > 0.94


def test_clipped_gradients_are_what_is_preconditioned() -> None:
    model, scaled = network(), network()
    optimizers = [unclipped(m, kf.Categorical(), lr=0.1, momentum=0.0) for m in (model, scaled)]
    x, y = batch(0)
    norms = []
    for m in (model, scaled):
        F.cross_entropy(m(x), y).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(m.parameters(), 1e-3 if m is model else 1e9)))
    for optimizer in optimizers:
        optimizer.step()
    start, factor = network(), 1e-3 / norms[1]
    for p, q, s in zip(model.parameters(), scaled.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(p - s, factor * (q - s), rtol=1e-2, atol=1e-12)


def test_closures_are_called_once_and_return_the_loss() -> None:
    model, twin = network(), network()
    optimizer, other = (unclipped(m, kf.Categorical(), lr=0.1) for m in (model, twin))
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        x, y = batch(0)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        calls.append(1)
        return loss

    loss = optimizer.step(closure)
    train(twin, other, 1)
    x, y = batch(0)
    assert len(calls) == 1
    assert loss.item() == pytest.approx(F.cross_entropy(network()(x), y).item())
    close(model, twin, 0.0)
    with torch.no_grad():
        assert optimizer.step(closure) is not None
    assert other.step.__doc__


def test_gradients_survive_the_step() -> None:
    model = network()
    optimizer = unclipped(model, kf.Categorical(), lr=0.1, weight_decay=0.1, kl_clip=1e-5)
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_the_loss_and_the_gradients_are_those_without_the_optimiser() -> None:
    model, twin = network(), network()
    kf_optimizer = unclipped(model, kf.Categorical(), lr=0.1)
    x, y = batch(0)
    losses = [F.cross_entropy(m(x), y) for m in (model, twin)]
    for loss in losses:
        loss.backward()
    assert torch.equal(losses[0], losses[1])
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert kf_optimizer._gatherer.gathered == 1


def test_parameters_without_gradients_stay() -> None:
    model = network()
    optimizer = unclipped(model, kf.Categorical(), lr=0.1, weight_decay=0.1)
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    model[2].weight.grad = None
    before = copy.deepcopy(model)
    optimizer.step()
    assert torch.equal(model[2].weight, before[2].weight)
    assert not torch.equal(model[2].bias, before[2].bias)


def test_parameters_may_be_frozen_later() -> None:
    model = network()
    optimizer = unclipped(model, kf.Categorical(), lr=0.1)
    train(model, optimizer, 2)
    model[0].requires_grad_(False)
    optimizer.zero_grad()
    before = copy.deepcopy(model)
    train(model, optimizer, 2, first=2)
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[2].weight, before[2].weight)


def test_frozen_parameters_are_neither_gathered_nor_moved() -> None:
    model = network()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    before = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = unclipped(model, kf.Categorical(), lr=0.1)
    train(model, optimizer, 2)
    assert optimizer.curvature().parameter_names == ("2.weight", "4.weight", "4.bias")
    assert torch.equal(model[0].weight, before[0].weight)
    assert torch.equal(model[2].bias, before[2].bias)
    assert not torch.equal(model[2].weight, before[2].weight)


# ---------------------------------------------------------------------------------------------------- averaging
def test_the_average_is_a_plain_mean_and_then_exponential() -> None:
    model = network()
    optimizer = unclipped(model, kf.Categorical(), lr=0.1, average=0.75)
    wanted, iterates = torch.zeros(0), []
    for step in range(8):
        train(model, optimizer, 1, first=step)
        current = model[0].weight.detach().clone()
        iterates.append(current)
        wanted = torch.stack(iterates).mean(0) if step < 4 else 0.75 * wanted + 0.25 * current
        with optimizer.averaged():
            torch.testing.assert_close(model[0].weight.detach(), wanted)
        assert torch.equal(model[0].weight, current)


def test_the_iterate_comes_back_after_an_error() -> None:
    model = network()
    optimizer = unclipped(model, kf.Categorical(), lr=0.1, average=0.9)
    train(model, optimizer, 3)
    before = copy.deepcopy(model)

    def fail() -> None:
        with optimizer.averaged():
            assert not torch.equal(model[0].weight, before[0].weight)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    close(model, before, 0.0)


def test_a_late_first_gradient_does_not_pull_the_average_to_zero() -> None:
    model = network()
    optimizer = unclipped(model, kf.Categorical(), lr=1e-9, average=0.9)
    for step in range(4):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if step < 3:
            model[0].weight.grad = None
        optimizer.step()
    with optimizer.averaged():
        close(model, network(), 1e-6)


@pytest.mark.parametrize(
    ("average", "steps", "text"), [(None, 1, "made with average="), (0.9, 0, "needs at least one step")]
)
def test_averaged_without_an_average(average: float | None, steps: int, text: str) -> None:
    model = network()
    optimizer = unclipped(model, kf.Categorical(), lr=0.1, average=average)
    train(model, optimizer, steps)
    with pytest.raises(RuntimeError, match=text), optimizer.averaged():
        pass


# ---------------------------------------------------------------------------------------------------- uncovered
class Mixed(nn.Module):
    """A linear layer, and parameters that no block covers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.bilinear, self.scale = nn.Linear(3, 4), nn.Bilinear(4, 4, 3), nn.Parameter(torch.ones(3))
        double(self)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x).tanh()
        return self.bilinear(hidden, hidden) * self.scale


def test_uncovered_parameters_take_the_plain_gradient_with_one_warning() -> None:
    model = Mixed()
    with pytest.warns(kf.CoverageWarning) as caught:
        optimizer = unclipped(model, kf.Categorical(), lr=0.1, momentum=0.0)
    (warning,) = caught
    for name in ("Trained without curvature", "bilinear.weight", "bilinear.bias", "scale"):
        assert name in str(warning.message)
    before = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1)
    for name in ("bilinear.weight", "bilinear.bias", "scale"):
        p, q = model.get_parameter(name), before.get_parameter(name)
        torch.testing.assert_close(p.detach(), q.detach() - 0.1 * p.grad)
    assert not torch.allclose(model.layer.weight, before.layer.weight - 0.1 * model.layer.weight.grad)


def fallback_pair(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], **options: Any
) -> tuple[Mixed, kf.optim.KFAC, Mixed, torch.optim.Optimizer]:
    """The optimiser with a fallback, and a twin whose uncovered parameters the same fallback trains alone."""
    model, twin = Mixed(), Mixed()
    with pytest.warns(kf.CoverageWarning, match="Trained by fallback"):
        optimizer = unclipped(model, kf.Categorical(), lr=0.1, fallback=make, **options)
    return model, optimizer, twin, make([*twin.bilinear.parameters(), twin.scale])


MAKERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.3, momentum=0.5),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_fallback_trains_what_has_no_curvature(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
    model, optimizer, twin, alone = fallback_pair(make, average=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    averages = []
    for step in range(4):
        x, y = batch(step)
        twin.layer.load_state_dict(model.layer.state_dict())
        twin.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        for group in alone.param_groups:
            group["lr"] = make([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] * 0.5**step
        alone.step()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        for name in ("bilinear.weight", "bilinear.bias", "scale"):
            torch.testing.assert_close(model.get_parameter(name), twin.get_parameter(name), rtol=1e-12, atol=1e-13)
        averages.append(model.scale.detach().clone())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    wanted = averages[0]
    for step, value in enumerate(averages[1:], 1):
        weight = max(0.5, 1 / (step + 1))
        wanted = (1 - weight) * wanted + weight * value
    with optimizer.averaged():
        torch.testing.assert_close(model.scale.detach(), wanted)


@pytest.mark.filterwarnings("ignore::kronfac.CoverageWarning")
def test_a_fallback_must_be_an_optimiser() -> None:
    with pytest.raises(TypeError, match=r"fallback must return a torch\.optim\.Optimizer, not list"):
        unclipped(Mixed(), kf.Categorical(), lr=0.1, fallback=lambda ps: ps)  # type: ignore[arg-type,return-value]
    assert unclipped(network(), kf.Categorical(), lr=0.1, fallback=MAKERS["adam"])._fallback is None


# ---------------------------------------------------------------------------------------------------- mixed precision
def scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0, **options)


def test_grad_scaler_unscales_before_the_step() -> None:
    model, plain = network(), network()
    optimizer, other = (unclipped(m, kf.Categorical(), lr=0.1) for m in (model, plain))
    scaling = scaler()
    for step in range(3):
        x, y = batch(step)
        optimizer.zero_grad()
        scaling.scale(F.cross_entropy(model(x), y)).backward()
        scaling.step(optimizer)
        scaling.update()
    train(plain, other, 3)
    close(model, plain, 1e-10)


@pytest.mark.filterwarnings("ignore::kronfac.CoverageWarning")
def test_grad_scaler_reaches_the_fallback() -> None:
    model, plain = Mixed(), Mixed()
    optimizer, other = (unclipped(m, kf.Categorical(), lr=0.1, fallback=MAKERS["sgd"]) for m in (model, plain))
    scaling, (x, y) = scaler(), batch(0)
    scaling.scale(F.cross_entropy(model(x), y)).backward()
    scaling.step(optimizer)
    train(plain, other, 1)
    close(model, plain, 1e-10)


def test_grad_scaler_skips_steps_with_infinite_gradients() -> None:
    model, plain = network(), network()
    optimizer, other = (unclipped(m, kf.Categorical(), lr=0.1, source="exact", ema=0.0) for m in (model, plain))
    scaling, before = scaler(), copy.deepcopy(model)
    x, y = batch(0)
    (scaling.scale(F.cross_entropy(model(x), y)) * 1e308).backward()
    scaling.step(optimizer)
    scaling.update()
    close(model, before, 0.0)
    assert scaling.get_scale() == 512.0
    assert optimizer._steps == 0
    optimizer.zero_grad()  # the repetition gathers the same batch once more: the same mean
    scaling.scale(F.cross_entropy(model(x), y)).backward()
    scaling.step(optimizer)
    train(plain, other, 1)
    close(model, plain, 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_with_float32_factors(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    plain = copy.deepcopy(model)
    optimizer, other = (unclipped(m, kf.Categorical(), lr=0.1, damping=0.1, source="exact") for m in (model, plain))
    x, y = torch.randn(64, 3), torch.arange(64) % 3
    for m, o, enabled in ((model, optimizer, True), (plain, other, False)):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            z = m(x)
            assert z.dtype == (dtype if enabled else torch.float32)
            loss = F.cross_entropy(z, y)
        loss.backward()
        o.step()
    for block in optimizer.curvature().blocks.values():
        assert all(tensor.dtype == torch.float32 for tensor in block.tensors().values())
    assert optimizer.state[model[0].weight]["momentum_buffer"].dtype == torch.float32
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.1, atol=0.01)


def test_a_model_in_bfloat16_is_trained() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(6, 3)).bfloat16()
    optimizer = unclipped(model, kf.Categorical(), lr=0.5, damping=0.1, average=0.9, kl_clip=0.01)
    x, y = torch.randn(16, 1, 3, dtype=torch.bfloat16), torch.arange(16) % 3
    before = copy.deepcopy(model)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert p.dtype == torch.bfloat16
        assert not torch.equal(p, q)
        assert p.isfinite().all()


@pytest.mark.parametrize(("likelihood", "terms"), [(kf.Categorical(), 1.0), (kf.Bernoulli(), 3.0)])
def test_the_automatic_clip_bounds_each_term_of_the_loss(likelihood: kf.Likelihood, terms: float) -> None:
    """0.01 nats for each label, or for each of an example's outputs under a loss summed over them."""
    model = double(nn.Linear(4, 3))
    optimizer = kf.optim.KFAC(model, likelihood, lr=50.0, damping=1e-3, momentum=0.0, source="exact")
    x = draw(8, 4)
    loss = F.cross_entropy(model(x), torch.arange(8) % 3) if terms == 1.0 else model(x).square().sum()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss.backward()
    optimizer.step()
    step = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    model.load_state_dict(before)
    exact = kf.GaussNewtonOperator(model, likelihood, (x[:2], None)).quadratic_form(step)
    torch.testing.assert_close(exact.item(), 0.01 * terms, rtol=1e-6, atol=0.0)


def test_the_automatic_clip_does_not_insist_on_a_forward() -> None:
    """Outputs captured by hand leave no arguments for an exact product: the step is taken unclipped."""
    model = nn.Sequential(double(nn.Linear(4, 3)))
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1, momentum=0.0)
    before = model[0].weight.detach().clone()
    with optimizer.capture() as capture:
        z = model[0](draw(8, 4))
        capture(z)
    F.cross_entropy(z, torch.arange(8) % 3).backward()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)
