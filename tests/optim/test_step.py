"""The step of ``KFAC`` against KFAC written down by hand, and against closed forms."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw
from tests.optim.hand_kfac import HandKFAC, network
from tests.optim.loops import STEPS, batch, close, train
from tests.optim.unclipped import unclipped
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf

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


@pytest.mark.parametrize("approximation", ["kfac", "diagonal", "dense", "sua", "prong"])
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
