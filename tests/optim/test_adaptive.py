"""``AdaptiveKFAC``: conjugate gradients on a quadratic, damping that finds its way, and what it refuses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw
from tests.optim.hand_kfac import network
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.optim import proposal
from kronfac.optim.levenberg_marquardt import LevenbergMarquardt

LABELS = torch.arange(24) % 3


class Sum(nn.Module):
    """A linear model in parts: its curvature is constant, and block-diagonal curvature is not all of it."""

    def __init__(self, parts: int, width: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(width, 1) for _ in range(parts))

    def forward(self, x: Tensor) -> Tensor:
        pieces = x.chunk(len(self.parts), dim=1)
        return sum(part(piece) for part, piece in zip(self.parts, pieces, strict=True))  # type: ignore[return-value]


def preconditioned_cg(matrix: Tensor, b: Tensor, solve: Callable[[Tensor], Tensor], steps: int) -> list[Tensor]:
    """Iterates of conjugate gradients for ``matrix x = b`` from zero."""
    x, r = torch.zeros_like(b), b.clone()
    z = solve(r)
    p, found = z, []
    for _ in range(steps):
        alpha = (r @ z) / (p @ matrix @ p)
        x = x + alpha * p
        after = r - alpha * (matrix @ p)
        z_after = solve(after)
        p = z_after + (after @ z_after) / (r @ z) * p
        r, z = after, z_after
        found.append(x)
    return found


def test_on_a_quadratic_it_is_preconditioned_conjugate_gradients() -> None:
    """The remark of Grosse & Martens 2016, A.2, for twenty steps on an ill-conditioned linear-Gaussian model."""
    model = double(Sum(5, 9))
    mixing = draw(45, 45, seed=3) + 2.0 * torch.eye(45, dtype=torch.float64)
    x, y = draw(80, 45) @ mixing, draw(80, 1, seed=1)
    likelihood = kf.Gaussian(reduction="mean")
    matrix = kf.reference.ggn(model, likelihood, x)
    optimizer = kf.optim.AdaptiveKFAC(
        model, likelihood, damping=1e-18, source="exact", damping_rule="exact", adapt_every=1000, greedy_every=None
    )
    gamma = 0.3
    optimizer._gamma = gamma
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    loss = likelihood.loss(model(x), y)
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    blocks = kf.estimate(model, likelihood, (x, y), source="exact").to_dense()
    damped = blocks + gamma * torch.eye(len(blocks), dtype=torch.float64)
    wanted = preconditioned_cg(matrix, -slope, lambda r: torch.linalg.solve(damped, r), 20)
    for iterate in wanted:
        optimizer.step(lambda: likelihood.loss(model(x), y))
        moved = nn.utils.parameters_to_vector(model.parameters()).detach() - start
        torch.testing.assert_close(moved, iterate, rtol=0, atol=1e-6 * float(iterate.norm()))
    assert float(wanted[-1].sub(wanted[-2]).norm()) > 1e-6 * float(wanted[-1].norm())  # it is still on its way


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    return network(), draw(24, 3), LABELS


def train(optimizer: kf.optim.AdaptiveKFAC, model: nn.Module, steps: int, x: Tensor, y: Tensor) -> list[float]:
    return [float(optimizer.step(lambda: F.cross_entropy(model(x), y))) for _ in range(steps)]


@pytest.mark.parametrize("options", [{}, {"damping_rule": "exact"}, {"momentum": False}, {"weight_decay": 1e-3}])
def test_it_trains_with_nothing_set(options: dict[str, Any]) -> None:
    model, x, y = problem()
    losses = train(kf.optim.AdaptiveKFAC(model, kf.Categorical(), **options), model, 60, x, y)
    plain, *_ = problem()
    sgd = torch.optim.SGD(plain.parameters(), lr=0.2, momentum=0.9)
    for _ in range(60):
        sgd.zero_grad()
        loss = F.cross_entropy(plain(x), y)
        loss.backward()
        sgd.step()
    assert losses[-1] < float(loss.detach())


@pytest.mark.parametrize("kind", ["AdaptiveKFAC", "KFLR"])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_a_bad_start_is_forgotten(kind: str, factor: float) -> None:
    model, x, y = problem()
    reference = kf.optim.AdaptiveKFAC(model, kf.Categorical())
    train(reference, model, 1, x, y)
    assert reference.report is not None
    model, x, y = problem()
    optimizer = getattr(kf.optim, kind)(model, kf.Categorical(), damping=factor * reference.report.lam)
    losses = train(optimizer, model, 120, x, y)
    assert losses[-1] < 0.5 * losses[0]
    assert all(math.isfinite(loss) for loss in losses)


def test_the_report_says_what_happened() -> None:
    model, x, y = problem()
    optimizer = kf.optim.AdaptiveKFAC(model, kf.Categorical(), weight_decay=0.01, damping=0.1, source="exact")
    matrix = kf.reference.ggn(model, kf.Categorical(), x)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    loss = optimizer.step(lambda: F.cross_entropy(model(x), y))
    step = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    report = optimizer.report
    assert report is not None
    assert (report.step, report.loss, report.mu, report.rejected) == (0, loss, 0.0, 0)
    assert report.objective == pytest.approx(loss + 0.005 * float(before @ before), rel=1e-12)
    assert report.norm == pytest.approx(float(step.norm()), rel=1e-9)
    assert report.kl == pytest.approx(0.5 * float(step @ matrix @ step), rel=1e-9)
    after = float(F.cross_entropy(model(x), y).detach()) + 0.005 * float((before + step) @ (before + step))
    assert report.actual == pytest.approx(after - report.objective, rel=1e-9)
    assert report.rho == pytest.approx(report.actual / report.predicted, rel=1e-12)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert optimizer.report.mu != 0.0
    assert optimizer.report.to_dict()["step"] == 1


def test_pi_is_that_of_the_factors() -> None:
    model, x, y = problem()
    optimizer = kf.optim.AdaptiveKFAC(model, kf.Categorical())
    train(optimizer, model, 3, x, y)
    for name, block in optimizer.curvature().blocks.items():
        a, g = block.tensors()["input"], block.tensors()["output"]
        wanted = (a.trace() / len(a) / (g.trace() / len(g))).sqrt()
        assert optimizer.pi()[name] == pytest.approx(float(wanted), rel=1e-12)


def test_a_step_that_raises_the_loss_is_taken_back() -> None:
    model, x, y = problem()
    optimizer = kf.optim.AdaptiveKFAC(model, kf.Categorical(), damping=1e-9)
    for parameter in model.parameters():  # saturated: the quadratic model is wrong by far
        parameter.data.mul_(6.0)
    losses = train(optimizer, model, 15, x, y)
    assert all(after <= before + 1e-12 for before, after in pairwise(losses[:6]))
    assert optimizer._lam.value > 1e-9


def test_no_descent_is_an_error_that_changes_nothing() -> None:
    model, x, y = problem()
    optimizer = kf.optim.AdaptiveKFAC(model, kf.Categorical(), damping=1.0)
    before = [p.detach().clone() for p in model.parameters()]

    def rising() -> Tensor:
        moved = sum((p.detach() - b).abs().sum() for p, b in zip(model.parameters(), before, strict=True))
        return F.cross_entropy(model(x), y) + 1e3 * moved

    with pytest.raises(RuntimeError, match="No step lowers the loss"):
        optimizer.step(rising)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_loss_that_overflows_in_between_takes_the_last_step_back() -> None:
    model, x, y = problem()
    optimizer = kf.optim.AdaptiveKFAC(model, kf.Categorical(), damping=0.1, adapt_every=50)
    train(optimizer, model, 8, x, y)
    good = [p.detach().clone() for p in model.parameters()]
    state, lam = [optimizer.state[p]["previous"] for p in model.parameters()], optimizer._lam.value
    for parameter, previous in zip(model.parameters(), state, strict=True):
        previous.fill_(1e3)
        parameter.data.add_(previous)

    def overflowing() -> Tensor:
        far = model[0].weight.detach().abs().max() > 100.0
        return F.cross_entropy(model(x), y) * (math.inf if far else 1.0)

    loss = float(optimizer.step(overflowing))
    assert math.isfinite(loss)
    assert optimizer._lam.value > lam
    assert all(float((p.detach() - g).abs().max()) < 10.0 for p, g in zip(model.parameters(), good, strict=True))


def test_dropout_draws_the_same_masks_within_a_step() -> None:
    torch.manual_seed(0)
    model = double(nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3)))
    x, y = draw(24, 3), LABELS
    optimizer = kf.optim.AdaptiveKFAC(model, kf.Categorical())
    losses = train(optimizer, model, 25, x, y)
    assert losses[0] != losses[1]
    assert optimizer.report is not None


def test_batch_norm_moves_its_statistics_once_a_step() -> None:
    model = double(nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)))
    x, y = draw(24, 3), LABELS
    optimizer = kf.optim.AdaptiveKFAC(model, kf.Categorical())
    train(optimizer, model, 7, x, y)
    assert int(model[1].num_batches_tracked) == 7


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Any) -> None:
    model, x, y = problem()
    optimizer = kf.optim.AdaptiveKFAC(model, kf.Categorical(), greedy_every=4, invert_every=3, average=0.9)
    train(optimizer, model, 9, x, y)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    wanted = train(optimizer, model, 12, x, y)
    fresh, *_ = problem()
    again = kf.optim.AdaptiveKFAC(fresh, kf.Categorical(), greedy_every=4, invert_every=3, average=0.9)
    parameters, state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh.load_state_dict(parameters)
    again.load_state_dict(copy.deepcopy(state))
    assert train(again, fresh, 12, x, y) == wanted
    with pytest.raises(ValueError, match="no state of AdaptiveKFAC"):
        again.load_state_dict(kf.optim.KFAC(fresh, kf.Categorical(), 0.1).state_dict())


def bad_closures() -> dict[str, tuple[Callable[[nn.Module, Tensor, Tensor], Any], type[Exception], str]]:
    def backward(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    def fresh_batch(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        fresh_batch.count = getattr(fresh_batch, "count", 0) + 1  # type: ignore[attr-defined]
        return F.cross_entropy(model(x + fresh_batch.count), y)  # type: ignore[attr-defined]

    return {
        "backward": (backward, RuntimeError, "called backward"),
        "vector": (lambda m, x, y: F.cross_entropy(m(x), y, reduction="none"), ValueError, "must return one number"),
        "number": (lambda m, x, y: F.cross_entropy(m(x), y).item(), TypeError, "not float"),
        "detached": (lambda m, x, y: F.cross_entropy(m(x), y).detach(), RuntimeError, "carries no gradient"),
        "twice": (lambda m, x, y: F.cross_entropy(m(x), y) + m(x).sum(), RuntimeError, "called the model 2 times"),
        "other batch": (fresh_batch, RuntimeError, "for the same parameters"),
        "nan": (lambda m, x, y: F.cross_entropy(m(x), y) * float("nan"), FloatingPointError, "loss is nan"),
        "nan inputs": (lambda m, x, y: F.cross_entropy(m(x * float("nan")), y), FloatingPointError, "NaN or Inf"),
    }


@pytest.mark.parametrize("case", bad_closures())
def test_closures_that_cannot_be_used(case: str) -> None:
    closure, kind, text = bad_closures()[case]
    model, x, y = problem()
    optimizer = kf.optim.AdaptiveKFAC(model, kf.Categorical())
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(kind, match=text):
        optimizer.step(lambda: closure(model, x, y))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"damping": 0.0}, ValueError, "damping"),
        ({"damping": "best"}, ValueError, "damping"),
        ({"fraction": 0.0}, ValueError, "fraction"),
        ({"adapt_every": 0}, ValueError, "adapt_every"),
        ({"greedy_every": 1.5}, ValueError, "greedy_every"),
        ({"burn_in": 3}, TypeError, "burn_in"),
        ({"param_groups": []}, TypeError, "param_groups"),
    ],
)
def test_arguments_that_are_refused(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        kf.optim.AdaptiveKFAC(network(), kf.Categorical(), **options)


class Graph(nn.Module):
    """Takes something besides its examples, which cannot be cut to a part of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, mixing: Tensor) -> Tensor:
        return self.layer(x) @ mixing  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "extra", "options", "count", "part"),
    [
        (nn.Linear(3, 3), (), {}, 1200, 300),
        (nn.Linear(3, 3), (), {}, 600, 250),
        (nn.Linear(3, 3), (), {}, 100, 100),
        (nn.Linear(3, 3), (), {"fraction": 0.1}, 100, 10),
        (nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3)), (), {}, 1200, 1200),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), (), {}, 1200, 1200),
        (Graph(), (torch.eye(3),), {}, 1200, 1200),
    ],
    ids=["quarter", "fewest", "small", "asked", "dropout", "batch norm", "other arguments"],
)
def test_the_part_of_a_mini_batch_that_products_see(
    model: nn.Module,
    extra: tuple[Tensor, ...],
    options: dict[str, Any],
    count: int,
    part: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    plain = proposal.ggn_gram

    def watched(root: nn.Module, likelihood: kf.Likelihood, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(len(inputs[0][0]))
        return plain(root, likelihood, inputs, *args, **kwargs)

    monkeypatch.setattr(proposal, "ggn_gram", watched)
    x, y = draw(count, 3).float(), torch.arange(count) % 3
    optimizer = kf.optim.AdaptiveKFAC(model.float().train(), kf.Categorical(), **options)
    optimizer.step(lambda: F.cross_entropy(model(x, *extra), y))
    assert set(seen) == {part}


def test_a_step_needs_a_closure() -> None:
    with pytest.raises(TypeError, match="needs a closure"):
        kf.optim.AdaptiveKFAC(network(), kf.Categorical()).step()


def test_levenberg_marquardt() -> None:
    rule = LevenbergMarquardt(1.0, 0.5)
    rule.update(0.5)
    assert rule.value == 1.0
    rule.update(0.9)
    rule.update(0.9)
    assert rule.value == 0.25
    rule.update(0.9)
    assert rule.value == 0.0625
    rule.update(-math.inf)
    assert rule.value == 0.125
