"""`kf.optim.EKFAC`: what it inverts and when, and that it trains."""

from __future__ import annotations

import pytest
import torch
from tests.exactness_helpers import double, draw, relative
from tests.optim.hand_kfac import network
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.approximations.ekfac import EKFACStatistic
from kronfac.blocks import EigenInverse, EigenKronecker, Uniform

LABELS = torch.arange(6) % 3


def make(model: nn.Module, **options: object) -> kf.optim.EKFAC:
    values = {"lr": 0.05, "damping": 0.1, "kl_clip": None, **options}
    return kf.optim.EKFAC(model, kf.Categorical(), **values)  # type: ignore[arg-type]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), LABELS).backward()
    optimizer.step()


def statistics(optimizer: kf.optim.EKFAC) -> dict[str, EKFACStatistic]:
    found = {name: s for name, s in optimizer._estimator.statistics.items() if isinstance(s, EKFACStatistic)}
    assert found
    return found


def test_the_first_step_is_that_of_kfac_with_exact_damping() -> None:
    models = [network(), network()]
    options = {"lr": 0.05, "damping": 0.1, "kl_clip": None, "weight_decay": 0.01}
    step(models[0], kf.optim.EKFAC(models[0], kf.Categorical(), **options), draw(6, 3))
    step(models[1], kf.optim.KFAC(models[1], kf.Categorical(), damping_rule="exact", **options), draw(6, 3))
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert relative(p.detach(), q.detach()) < 1e-10


def test_later_steps_use_the_running_second_moments() -> None:
    """Step 1 renews the basis, step 2 too, step 3 does not; all gather, and each move is the dense solution."""
    model = network()
    optimizer = make(model, source="exact", momentum=0.0)
    for number in range(5):
        before = [p.detach().clone() for p in model.parameters()]
        step(model, optimizer, draw(6, 3, seed=number))
        curvature = optimizer.curvature()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        dense = curvature.to_dense() + 0.1 * torch.eye(sum(p.numel() for p in before), dtype=torch.float64)
        flat = torch.nn.utils.parameters_to_vector([gradients[name] for name in curvature.parameter_names])
        wanted = torch.nn.utils.parameters_to_vector(before) - 0.05 * torch.linalg.solve(dense, flat)
        assert relative(torch.nn.utils.parameters_to_vector(model.parameters()).detach(), wanted) < 1e-10
        assert all(isinstance(block, EigenKronecker) for block in curvature.blocks.values())
    plain = kf.optim.KFAC(model, kf.Categorical(), lr=0.1, source="exact")
    step(model, plain, draw(6, 3))
    assert relative(optimizer.curvature().to_dense(), plain.curvature().to_dense()) > 1e-2


def test_values_are_renewed_whenever_statistics_are_due_and_bases_when_inverses_are() -> None:
    model = network()
    optimizer = make(model, stats_every=3, invert_every=8, burn_in=1)
    bases, values = [], []
    for number in range(17):
        step(model, optimizer, draw(6, 3, seed=number))
        inverse, own = optimizer._inverses["2"], statistics(optimizer)["2"]
        assert isinstance(inverse, EigenInverse)
        assert own.basis is not None
        assert inverse.basis.output is own.basis.output
        assert inverse.basis.input is own.basis.input
        bases.append(own.basis)
        values.append(inverse.reciprocals.clone())
        if number % 3 == 0:
            wanted = own.block().factorise(Uniform(0.1))
            assert isinstance(wanted, EigenInverse)
            assert torch.equal(inverse.reciprocals, wanted.reciprocals)
    renewed = [number for number in range(1, 17) if bases[number] is not bases[number - 1]]
    changed = [number for number in range(1, 17) if relative(values[number], values[number - 1]) > 1e-9]
    assert renewed == [1, 2, 4, 8, 16]
    assert changed == [3, 4, 6, 8, 9, 12, 15, 16], "the first two new bases are those of the same factors"


def test_a_new_damping_holds_from_the_next_statistics_on() -> None:
    model = network()
    optimizer = make(model, stats_every=2, burn_in=1)
    for number in range(6):
        step(model, optimizer, draw(6, 3, seed=number))
    optimizer.param_groups[0]["damping"] = 7.0
    step(model, optimizer, draw(6, 3, seed=7))
    inverse = optimizer._inverses["0"]
    assert isinstance(inverse, EigenInverse)
    torch.testing.assert_close(inverse.reciprocals, 1 / (inverse.basis.values + 7.0))


def test_the_trace_is_the_running_mean_of_squared_gradients_once_the_start_is_forgotten() -> None:
    """Through three changes of basis: with the first batch forgotten, nothing of K-FAC's trace is left."""
    model = network()
    optimizer = make(model, source="exact", lr=0.0, stats_every=1, invert_every=2, ema=0.5)
    wanted, weight = dict.fromkeys(statistics(optimizer), 0.0), 0.0
    for number in range(60):
        x = draw(6, 3, seed=number)
        exact = kf.estimate(model, kf.Categorical(), (x, None), source="exact", approximation="dense")
        wanted = {name: 0.5 * wanted[name] + float(block.trace()) for name, block in exact.blocks.items()}
        weight = 0.5 * weight + 1.0
        step(model, optimizer, x)
    for name, block in optimizer.curvature().blocks.items():
        assert float(block.trace()) == pytest.approx(wanted[name] / weight, rel=1e-10)


class Small(nn.Module):
    """Convolutions, groups and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten()
        )
        self.head = nn.Linear(36, 3)
        double(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_it_trains() -> None:
    y = torch.arange(60) % 3
    x = draw(60, 1, 4, 4) + 1.5 * draw(3, 1, 4, 4, seed=1)[y]
    losses = []
    for _ in range(2):
        model = Small()
        optimizer = kf.optim.EKFAC(model, kf.Categorical(), lr=0.3, damping=1e-2, stats_every=2, invert_every=8)
        for _ in range(40):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        losses.append((float(F.cross_entropy(Small()(x), y).detach()), float(loss.detach())))
    assert losses[0] == losses[1]
    assert losses[0][1] < 0.1 * losses[0][0]


def test_warm_up_fills_the_factors() -> None:
    model = network()
    optimizer = make(model, source="exact")
    optimizer.warm_up([(draw(6, 3, seed=seed), LABELS) for seed in range(4)])
    loader = [(draw(6, 3, seed=seed), LABELS) for seed in range(4)]
    wanted = kf.estimate(model, kf.Categorical(), loader, source="exact").to_dense()
    assert relative(optimizer.curvature().to_dense(), wanted) < 1e-10


def test_what_it_decides_itself_cannot_be_given() -> None:
    for name, value in (("approximation", "kfac"), ("damping_rule", "factored")):
        with pytest.raises(TypeError, match=name):
            make(network(), **{name: value})
    with pytest.raises(ValueError, match="approximation='ekfac' needs paired statistics"):
        make(network(), source="forward_only")
