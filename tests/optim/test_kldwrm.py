"""`KLDWRM`: SO and Q steps minimise the wake objectives that define them, QE descends on its own; resuming; errors."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw, relative
from tests.optim.hand_kfac import network
from tests.optim.loops import Mixed, batch
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.blocks import Block, Dense, Diagonal, DiagonalKronecker, Kronecker, KroneckerSum, ScaledKronecker
from kronfac.damping import Rescaled, Rule, exact, factored, normal
from kronfac.optim.iterative_sum import IterativeSum
from kronfac.optim.wake import Damped

DAMPING = 0.1
Matrices = Callable[[int, nn.Module, Tensor], Tensor]


def make(model: nn.Module, lam: float = 3.0, **options: Any) -> kf.optim.KLDWRM:
    options = {
        "approximation": "dense", "source": "exact", "damping": DAMPING, "stats_every": 1, "kl_clip": None, **options,
    }  # fmt: skip
    return kf.optim.KLDWRM(model, kf.Categorical(), lam, **options)


def vector(model: nn.Module) -> Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def constant(step: int) -> float:
    return 3.0


def variable(step: int) -> float:
    return 3.0 * (1.5 + torch.tensor(0.7 * step).sin().item())


def wake_step(
    fishers: list[Tensor], model: Tensor | float, linear: Tensor, steps: list[Tensor], lam: float, rho: float
) -> Tensor:
    """Minimise ``linearᵀs + ½ sᵀ model s + λ/2 Σ_i κ(i) ρ^(k−i) ‖s + Σ_{j=i}^{k−1} s_j‖²_{F_i}`` densely."""
    k = len(steps)
    quadratic = torch.zeros_like(fishers[0]) + model
    for i, fisher in enumerate(fishers):
        weight = lam * (1.0 if i == 0 else 1.0 - rho) * rho ** (k - i)
        quadratic = quadratic + weight * fisher
        for earlier in steps[i:]:
            linear = linear + weight * fisher @ earlier
    return -torch.linalg.solve(quadratic, linear)


def dense_fisher(step: int, model: nn.Module, x: Tensor) -> Tensor:
    curvature = kf.estimate(model, kf.Categorical(), (x, None), approximation="dense", source="exact")
    dense = curvature.to_dense()
    return dense + DAMPING * torch.eye(len(dense), dtype=dense.dtype)


def errors_against_the_wake(
    optimizer: kf.optim.KLDWRM, model: nn.Module, schedule: Callable[[int], float], rho: float, count: int = 30
) -> tuple[list[float], list[float]]:
    """Relative errors of steps up to their length, and the lengths, of 30 steps with dense curvature."""
    fishers: list[Tensor] = []
    steps: list[Tensor] = []
    errors, lengths = [], []
    momentum = optimizer.defaults["momentum"]
    for k in range(count):
        x, y = batch(k)
        lam = schedule(k)
        for group in optimizer.param_groups:
            group["lr"] = 1 / lam
        fishers.append(dense_fisher(k, model, x))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        before, g = vector(model), gradient(model)
        optimizer.step()
        taken = vector(model) - before
        new = taken - momentum * steps[-1] if steps else taken
        wanted = wake_step(fishers, 0.0 if optimizer._variant == "so" else fishers[-1], g, steps, lam, rho)
        length = float(new @ wanted / (wanted @ wanted))
        errors.append(relative(new, length * wanted))
        lengths.append(length)
        steps.append(taken)
    return errors, lengths


@pytest.mark.parametrize("variant", ["so", "q"])
@pytest.mark.parametrize("schedule", [constant, variable])
@pytest.mark.parametrize("solve", ["stein", "reweighted"])
def test_steps_minimise_the_wake_objective(variant: str, schedule: Callable[[int], float], solve: str) -> None:
    """Propositions 4.1, 4.2 and A.1 for thirty steps; dense blocks average exactly, whatever the solve."""
    model = network()
    errors, lengths = errors_against_the_wake(make(model, variant=variant, rho=0.6, solve=solve), model, schedule, 0.6)
    assert max(errors) <= 1e-10
    assert max(abs(length - 1) for length in lengths) <= 1e-10


@pytest.mark.parametrize("variant", ["so", "q"])
@pytest.mark.parametrize("options", [{"kl_clip": 1e-2}, {"kl_clip": 1e-2, "kl_product": "approximate"}])
def test_the_wake_is_of_the_clipped_steps(variant: str, options: dict[str, Any]) -> None:
    model = network()
    errors, lengths = errors_against_the_wake(make(model, variant=variant, **options), model, variable, 0.5)
    assert max(errors) <= 1e-10
    assert min(lengths) < 0.9, "the clip was never active"
    assert max(lengths) <= 1 + 1e-10


@pytest.mark.parametrize("variant", ["so", "q"])
def test_the_wake_is_of_the_steps_with_momentum(variant: str) -> None:
    model = network()
    errors, lengths = errors_against_the_wake(make(model, variant=variant, momentum=0.5), model, variable, 0.5)
    assert max(errors) <= 1e-10
    assert max(abs(length - 1) for length in lengths) <= 1e-10


@pytest.mark.parametrize("variant", ["so", "q"])
def test_each_layers_root_mean_square_is_clipped(variant: str) -> None:
    """The second rule of 7.1: layers are scaled one by one, and the wake knows."""
    model, rho = network(), 0.5
    bound = 0.1
    optimizer = make(model, variant=variant, rho=rho, rms_clip=bound)
    fishers, steps, clipped = [], [], 0
    sizes = [16, 25, 18]
    for k in range(30):
        x, y = batch(k)
        fishers.append(dense_fisher(k, model, x))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        before, g = vector(model), gradient(model)
        optimizer.step()
        taken = vector(model) - before
        wanted = wake_step(fishers, 0.0 if variant == "so" else fishers[-1], g, steps, 3.0, rho)
        for new, full in zip(taken.split(sizes), wanted.split(sizes), strict=True):
            rms = float(full.square().mean().sqrt())
            clipped += rms > bound
            assert relative(new, full * min(1.0, bound / rms)) <= 1e-10
        steps.append(taken)
    assert 0 < clipped < 90


class HandFactors:
    """K-FAC's averaged and newest factors, damped, as dense matrices."""

    def __init__(self, rho: float) -> None:
        self.rho, self.means = rho, {}  # type: ignore[var-annotated]

    def __call__(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        found = kf.estimate(model, kf.Categorical(), (x, None), source="exact")
        average, newest = {}, {}
        for name, block in found.blocks.items():
            assert isinstance(block, Kronecker)
            if name in self.means:
                old = self.means[name]
                self.means[name] = Kronecker(
                    self.rho * old.input + (1 - self.rho) * block.input,
                    self.rho * old.output + (1 - self.rho) * block.output,
                )
            else:
                self.means[name] = block
            for blocks, each in ((average, self.means[name]), (newest, block)):
                blocks[name] = Damped.of(each, factored(each, DAMPING)).block
        names, layouts = found.parameter_names, found.layouts
        self.newest, self.average = newest, average
        dense = [kf.BlockDiagonal(blocks, layouts, names).to_dense() for blocks in (average, newest)]
        return dense[0], dense[1]


@pytest.mark.parametrize("variant", ["so", "q"])
@pytest.mark.parametrize("period", [1, 3])
def test_kronecker_factors_are_averaged_as_in_the_paper(variant: str, period: int) -> None:
    """(13) and (78), and between gatherings (20): the wake's matrices are what the averages imply."""
    model, rho = network(), 0.6
    optimizer = make(model, variant=variant, rho=rho, approximation="kfac", stats_every=period, burn_in=0)
    hand, fishers, steps = HandFactors(rho), [], []
    before = torch.zeros(0)
    for k in range(30):
        x, y = batch(k)
        if k % period == 0:
            average, newest = hand(model, x)
            fishers.append(average if k == 0 else (average - rho * before) / (1 - rho))
            before, latest = average, newest
        else:
            fishers.append(average)
            latest = average
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        start, g = vector(model), gradient(model)
        optimizer.step()
        steps.append(vector(model) - start)
        wanted = wake_step(fishers, 0.0 if variant == "so" else latest, g, steps[:-1], 3.0, rho)
        assert relative(steps[-1], wanted) <= 1e-9


def test_natural_gradient_with_an_average_solves_a_wake_of_quadratic_models() -> None:
    """Proposition 3.1, by `kronfac.optim.KFAC` whose first batch counts 1/(1 − ρ) times."""
    model, rho, lam = network(), 0.5, 3.0
    optimizer = kf.optim.KFAC(
        model, kf.Categorical(), 1 / lam, momentum=0.0, damping=DAMPING, approximation="dense", source="exact",
        stats_every=1, invert_every=1, ema=rho, kl_clip=None,
    )  # fmt: skip
    optimizer.warm_up([batch(0)] * 2)
    fishers, gradients, steps = [], [], []
    for k in range(30):
        x, y = batch(k)
        fishers.append(dense_fisher(k, model, x))
        optimizer.zero_grad()
        if k:
            loss = F.cross_entropy(model(x), y)
        else:
            with optimizer.paused():
                loss = F.cross_entropy(model(x), y)
        loss.backward()
        gradients.append(gradient(model))
        before = vector(model)
        optimizer.step()
        linear = sum(rho ** (k - i) * g for i, g in enumerate(gradients))
        assert isinstance(linear, Tensor)
        wanted = wake_step(fishers, 0.0, linear, steps, lam, rho)
        steps.append(vector(model) - before)
        assert relative(steps[-1], wanted) <= 1e-10


def steps_of(model: nn.Module, optimizer: kf.optim.KLDWRM, x: Tensor, loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
    out = []
    for _ in range(8):
        optimizer.zero_grad()
        loss(model(x)).backward()
        before = vector(model)
        optimizer.step()
        out.append(vector(model) - before)
    return out


def test_reweighting_is_exact_where_a_factor_does_not_change() -> None:
    x, y = draw(24, 3), (draw(24, 2, seed=1) > 0).double()
    found = []
    for solve in ("stein", "reweighted"):
        model = double(nn.Sequential(nn.Linear(3, 2)))
        optimizer = kf.optim.KLDWRM(
            model, kf.Bernoulli(reduction="mean"), 0.5, variant="q", solve=solve, source="exact", damping=0.0,
            stats_every=1, kl_clip=None,
        )  # fmt: skip
        found.append(steps_of(model, optimizer, x, lambda z: F.binary_cross_entropy_with_logits(z, y)))
    for stein, reweighted in zip(*found, strict=True):
        assert relative(reweighted, stein) <= 1e-10
    assert relative(found[0][1], found[0][0]) > 0.05, "nothing moved"


@pytest.mark.parametrize("lam", [1.0, 100.0])
def test_reweighted_steps_follow_their_formula_and_differ_from_stein(lam: float) -> None:
    """(82), (83) and (89) with both factors divided by √(1 + 1/λ)."""
    model, rho = network(), 0.5
    optimizer = make(model, lam, variant="q", solve="reweighted", rho=rho, approximation="kfac")
    hand, wake, worst = HandFactors(rho), None, 0.0
    for k in range(6):
        x, y = batch(k)
        average, newest = hand(model, x)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        before, g = vector(model), gradient(model)
        optimizer.step()
        blocks = {}
        for name, old in hand.average.items():
            new = hand.newest[name]
            root = (1 + 1 / lam) ** 0.5
            blocks[name] = Kronecker((old.input + new.input / lam) / root, (old.output + new.output / lam) / root)
        shape = optimizer.curvature()
        matrix = kf.BlockDiagonal(blocks, shape.layouts, shape.parameter_names).to_dense()
        modified = g if wake is None else g + lam * rho * wake
        wanted = -torch.linalg.solve(matrix, modified) / lam
        taken = vector(model) - before
        assert relative(taken, wanted) <= 1e-9
        worst = max(worst, relative(wanted, -torch.linalg.solve(average + newest / lam, modified) / lam))
        wake = average @ taken if wake is None else rho * wake + average @ taken
    assert 1e-6 < worst < 1.0 / lam


@pytest.mark.parametrize(
    ("approximation", "solve"),
    [
        ("tkfac", "stein"),
        ("tkfac", "reweighted"),
        ("diagonal", "stein"),
        ("sua", "stein"),
        ("prong", "stein"),
        ("kfac", "iterative"),
        ("tkfac", "iterative"),
        ("dense", "iterative"),
    ],
)
def test_q_composes_with_other_approximations(approximation: str, solve: str) -> None:
    compose(approximation, approximation, solve, {})


@pytest.mark.parametrize(("f", "b"), [("kfac", "diagonal"), ("diagonal", "kfac"), ("kfac", "dense"), ("tkfac", "kfac")])
def test_the_model_may_have_a_structure_of_its_own(f: str, b: str) -> None:
    """Future work (c)."""
    compose(f, b, "iterative", {"model_approximation": b})


def compose(approximation: str, model_approximation: str, solve: str, options: dict[str, Any]) -> None:
    """``[F̄ + B/λ] s = −ĝ/λ`` with the averages that the optimiser reports and the newest estimate, both damped."""
    model, rho, lam = double(nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))), 0.6, 2.0
    optimizer = make(model, lam, variant="q", solve=solve, rho=rho, approximation=approximation, **options)
    wake = None
    for k in range(5):
        x, y = draw(8, 1, 3, 3, seed=k), torch.arange(8) % 3
        newest = kf.estimate(model, kf.Categorical(), (x, None), approximation=model_approximation, source="exact")
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        before, g = vector(model), gradient(model)
        optimizer.step()
        taken, average = vector(model) - before, optimizer.curvature()
        dense = []
        for found in (average, newest):
            blocks = {}
            for name, block in found.blocks.items():
                damped = Damped.of(block, factored(block, DAMPING))
                identity = torch.eye(block.shape.numel(), dtype=torch.float64)
                blocks[name] = Dense(damped.block.to_dense() + damped.added * identity, block.shape)
            dense.append(kf.BlockDiagonal(blocks, found.layouts, found.parameter_names).to_dense())
        modified = g if wake is None else g + lam * rho * wake
        wanted = -torch.linalg.solve(dense[0] + dense[1] / lam, modified) / lam
        # Re-weighting is another matrix: its distance is that of the next test, and of the documentation.
        assert relative(taken, wanted) <= (0.1 if solve == "reweighted" else 1e-9)
        wake = dense[0] @ taken if wake is None else rho * wake + dense[0] @ taken


# --------------------------------------------------------------------------------------------------------------- QE
def test_with_a_quadratic_divergence_qe_is_q() -> None:
    """A linear model with Gaussian noise on one batch: the Q step is where the exact objective is stationary."""
    x, y = draw(24, 3), draw(24, 2, seed=1)
    found: list[list[Tensor]] = []
    for variant in ("q", "qe"):
        model = double(nn.Sequential(nn.Linear(3, 2)))
        optimizer = kf.optim.KLDWRM(
            model, kf.Gaussian(), 2.0, variant=variant, source="exact", approximation="dense", damping=0.0, zeta=1.0,
            stats_every=1, n_cap=20, omega=0.1, kl_clip=None, rho=0.7,
        )  # fmt: skip
        steps = []
        for _ in range(8):
            before = vector(model)

            def loss(model: nn.Module = model) -> Tensor:
                return kf.Gaussian().loss(model(x), y)

            if variant == "q":
                optimizer.zero_grad()
                loss().backward()
                optimizer.step()
            else:
                optimizer.step(loss)
            steps.append(vector(model) - before)
        found.append(steps)
    for q, qe in zip(*found, strict=True):
        assert relative(qe, q) <= 1e-10


def test_qe_becomes_q_for_large_lambda() -> None:
    x, y = draw(24, 3), (draw(24, 2, seed=1) > 0).double()
    distances = []
    for lam in (10.0, 100.0, 1000.0):
        ends = []
        for n_inner in (0, 400):
            model = double(nn.Sequential(nn.Linear(3, 2)))
            optimizer = kf.optim.KLDWRM(
                model, kf.Bernoulli(), lam, variant="qe", source="exact", approximation="dense", damping=0.0,
                zeta=1.0, stats_every=1, omega=0.5, n_inner=n_inner, kl_clip=None,
            )  # fmt: skip
            before = vector(model)
            optimizer.step(lambda model=model: kf.Bernoulli().loss(model(x), y))
            ends.append(vector(model) - before)
        distances.append(relative(ends[1], ends[0]))
    assert distances[0] > 1e-4, "the exact divergence made no difference"
    assert all(after < 0.2 * before for before, after in pairwise(distances))


@pytest.mark.parametrize("likelihood", [kf.Categorical(), kf.Bernoulli(reduction="mean"), kf.Gaussian()])
def test_the_inner_loop_descends(likelihood: kf.Likelihood) -> None:
    model = network()
    optimizer = kf.optim.KLDWRM(
        model, likelihood, 20.0, variant="qe", omega=0.003, zeta=1.0, rho=0.5, stats_every=2, burn_in=0, kl_clip=None
    )
    losses = []
    for k in range(6):
        x, y = batch(0, 24)
        targets = y if isinstance(likelihood, kf.Categorical) else F.one_hot(y, 3).double()
        losses.append(optimizer.step(lambda x=x, t=targets: likelihood.loss(model(x), t)))
        assert len(optimizer.inner_objectives) == 10
        assert all(after < before for before, after in pairwise(optimizer.inner_objectives))
        assert len(optimizer._networks.kept) == min(k + 1, 3)  # N_CAP = 4, the present network included
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("xi", [0.5, 0.0, 0.8])
def test_the_exact_objective_by_hand(xi: float) -> None:
    """Its values at the Q step, from networks of their own."""
    model, rho, lam, zeta = network(), 0.4, 2.0, 0.5
    optimizer = make(
        model,
        lam,
        variant="qe",
        rho=rho,
        n_inner=1,
        omega=0.02,
        zeta=zeta,
        xi=xi,
        approximation="kfac",
        n_cap=3,
        weight_decay=0.1,
    )
    plain = copy.deepcopy(model)
    likelihood, networks = kf.Categorical(), []
    for k in range(5):
        x, y = batch(k)
        networks.append(copy.deepcopy(model))
        # The Q step from the same state: one more QE optimiser without inner iterations.
        plain.load_state_dict(model.state_dict())
        other = make(plain, lam, variant="qe", rho=rho, n_inner=0, approximation="kfac", n_cap=3, weight_decay=0.1)
        if k:
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        before = vector(model)
        other.step(lambda x=x, y=y: F.cross_entropy(plain(x), y))
        start = vector(plain) - before
        fresh = kf.estimate(networks[-1], likelihood, (x, None), source="exact")
        damped = {n: Damped.of(b, factored(b, DAMPING + 0.1)).block for n, b in fresh.blocks.items()}
        b_matrix = kf.BlockDiagonal(damped, fresh.layouts, fresh.parameter_names).to_dense()
        point = copy.deepcopy(plain)
        penalised = F.cross_entropy(networks[-1](x), y) + 0.05 * sum(
            p.square().sum() for p in networks[-1].parameters()
        )
        g = torch.cat([d.flatten() for d in torch.autograd.grad(penalised, list(networks[-1].parameters()))])
        divergence = torch.zeros(())
        for i in range(max(0, k - 2), k + 1):
            weight = zeta * (1.0 if i == 0 else 1 - rho) * rho ** (k - i)
            old, new = networks[i](x).detach().log_softmax(1), point(x).log_softmax(1)
            terms = xi * old.exp() * (old - new) + (1 - xi) * new.exp() * (new - old)
            divergence = divergence + weight * terms.sum(1).mean()
        wanted = (g @ start + 0.5 * start @ b_matrix @ start) / lam + divergence.detach()
        slopes = torch.cat([d.flatten() for d in torch.autograd.grad(divergence, list(point.parameters()))])
        optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
        assert optimizer.inner_objectives == pytest.approx([float(wanted)], rel=1e-9)
        moved = start - 0.02 * ((g + b_matrix @ start) / lam + slopes)
        assert relative(vector(model) - before, moved) <= 1e-9


def test_targets_captured_by_hand_reach_the_divergences() -> None:
    """An ignored target counts in no term: its example could as well be missing."""
    x, y = batch(0)
    y = torch.where(y == 0, -1, y)
    found = []
    for kept in (torch.ones_like(y, dtype=torch.bool), y != -1):
        model = network()
        optimizer = kf.optim.KLDWRM(
            model, kf.Categorical(ignore_index=-1, reduction="mean"), 3.0, variant="qe", source="exact", stats_every=1,
            zeta=1.0, omega=0.01, damping=DAMPING, kl_clip=None,
        )  # fmt: skip
        inputs, targets = x[kept], y[kept]

        def loss(model: Any = model, optimizer: Any = optimizer, x: Tensor = inputs, y: Tensor = targets) -> Tensor:
            with optimizer.capture() as capture:
                z = model(x)
                capture(z, y)
            return F.cross_entropy(z, y, ignore_index=-1)

        for _ in range(3):
            optimizer.step(loss)
        found.append(vector(model))
    assert relative(found[0], found[1]) <= 1e-10


def test_micro_batches_are_one_batch() -> None:
    model, twin = network(), network()
    optimizer, other = (make(each, variant="q", approximation="kfac") for each in (model, twin))
    for step in range(3):
        x, y = batch(step)
        optimizer.zero_grad()
        for part in (slice(0, 4), slice(4, 8)):
            (0.5 * F.cross_entropy(model(x[part]), y[part])).backward()
        optimizer.step()
        loop(twin, other, range(step, step + 1), "q")
        assert relative(vector(model), vector(twin)) <= 1e-9


def test_dropout_masks_are_those_of_the_forward() -> None:
    """All networks of a step see one mask: the divergence from itself is zero at s = 0."""
    model = double(nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 3)))
    optimizer = make(model, 1e12, variant="qe", n_inner=1, zeta=1.0, omega=1e-3, approximation="kfac")
    torch.manual_seed(0)
    x, y = batch(0)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert abs(optimizer.inner_objectives[0]) < 1e-20


# ------------------------------------------------------------------------------------------------------- conventions
def loop(model: nn.Module, optimizer: kf.optim.KLDWRM, steps: range, variant: str) -> list[float]:
    losses = []
    for step in steps:
        x, y = batch(step % 3)
        if variant == "qe":
            losses.append(float(optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))))
        else:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


CASES: list[dict[str, Any]] = [
    {"variant": "so", "momentum": 0.5, "average": 0.5},
    {"variant": "so", "approximation": "tkfac", "momentum": 0.3},
    {"variant": "q"},
    {"variant": "q", "solve": "reweighted", "rms_clip": 0.05},
    {"variant": "qe", "omega": 0.05, "zeta": 1.0},
    {"variant": "q", "solve": "iterative", "damping_rule": "exact"},
    {"variant": "qe", "omega": 0.05, "solve": "iterative", "model_approximation": "diagonal", "stats_every": 1},
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("stop", [4, 5])
def test_a_resumed_run_is_the_run_that_never_stopped(options: dict[str, Any], stop: int) -> None:
    options = {
        "approximation": "kfac",
        "source": "sampled",
        "stats_every": 3,
        "burn_in": 0,
        "kl_clip": "auto",
        **options,
    }
    model = network()
    optimizer = make(model, **options)
    loop(model, optimizer, range(stop), options["variant"])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    resumed = make(other, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert loop(model, optimizer, range(stop, 12), options["variant"]) == loop(
        other, resumed, range(stop, 12), options["variant"]
    )
    assert torch.equal(vector(model), vector(other))


def test_a_state_saved_between_forward_and_step_is_that_of_the_last_step() -> None:
    model = network()
    optimizer = make(model, approximation="kfac")
    loop(model, optimizer, range(3), "so")
    wanted = optimizer.curvature().to_dense()
    loss = F.cross_entropy(model(batch(3)[0]), batch(3)[1])
    assert torch.equal(optimizer.curvature().to_dense(), wanted)
    other = make(copy.deepcopy(model), approximation="kfac")
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.curvature().to_dense(), wanted)
    loss.backward()
    optimizer.step()
    assert relative(optimizer.curvature().to_dense(), wanted) > 1e-3


@pytest.mark.parametrize("options", CASES)
def test_the_loss_falls(options: dict[str, Any]) -> None:
    model = network()
    optimizer = make(model, 20.0, **{"approximation": "kfac", "kl_clip": "auto", "stats_every": 5, **options})
    losses = loop(model, optimizer, range(120), options["variant"])
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_a_scheduler_drives_lambda_down_to_a_rate_of_zero() -> None:
    model = network()
    optimizer = make(model, variant="q")
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=4)
    for step in range(6):
        before = vector(model)
        loop(model, optimizer, range(step, step + 1), "q")
        scheduler.step()
        assert torch.isfinite(vector(model)).all()
    # Without a learning rate the wake still pulls back to where the iterates were.
    assert relative(vector(model), before) < 0.1


@pytest.mark.parametrize("variant", ["so", "q"])
def test_without_a_wake_it_is_kfac_or_adds_the_model(variant: str) -> None:
    """ρ = 0: plain natural gradient on the newest batch, for Q with ``(1 + 1/λ) F``; F = I where uncovered."""
    model, other = Mixed(), Mixed()
    with pytest.warns(kf.CoverageWarning):
        optimizer = make(model, 4.0, variant=variant, rho=0.0, approximation="kfac")
    with pytest.warns(kf.CoverageWarning):
        plain = kf.optim.KFAC(
            other, kf.Categorical(), 0.25 / (1.0 if variant == "so" else 1.25), momentum=0.0, damping=DAMPING,
            source="exact", stats_every=1, invert_every=1, ema=0.0, kl_clip=None,
        )  # fmt: skip
    for step in range(4):
        for each, net in ((optimizer, model), (plain, other)):
            each.zero_grad()
            F.cross_entropy(net(batch(step)[0]), batch(step)[1]).backward()
            each.step()
        torch.testing.assert_close(vector(model), vector(other), rtol=1e-9, atol=1e-12)


def test_an_embedding_is_trained_where_there_is_a_solve() -> None:
    x = torch.arange(12).reshape(12, 1) % 5
    choices = ({"variant": "so", "momentum": 0.5}, {"variant": "q", "solve": "reweighted"}, {"solve": "iterative"})
    for options in ({"variant": "q", **choice} for choice in choices):
        model = double(nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(4, 3)))
        optimizer, losses = make(model, 2.0, approximation="kfac", **options), []
        for _ in range(40):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), x[:, 0] % 3)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.7 * losses[0]


def test_a_step_that_failed_can_be_repeated() -> None:
    """NaN in the gradient: nothing changes, and the batch is gathered anew."""
    model, twin = network(), network()
    optimizer, other = make(model, approximation="kfac"), make(twin, approximation="kfac")
    loop(model, optimizer, range(3), "so")
    loop(twin, other, range(3), "so")
    F.cross_entropy(model(batch(3)[0]), batch(3)[1]).backward()
    next(model.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]
    before = vector(model)
    with pytest.raises(FloatingPointError, match="no parameter was changed"):
        optimizer.step()
    assert torch.equal(vector(model), before)
    assert loop(model, optimizer, range(3, 6), "so") == loop(twin, other, range(3, 6), "so")


def positive(*shape: int, seed: int = 0) -> Tensor:
    root = draw(*shape, shape[-1] + 2, seed=seed)
    return root @ root.mT / shape[-1]


@pytest.mark.parametrize("rule", [factored, exact, normal])
def test_the_damped_product_is_what_the_inverse_inverts(rule: Rule) -> None:
    blocks: list[Block] = [
        Kronecker(positive(2, 4), positive(2, 3, seed=1)),
        DiagonalKronecker(draw(2, 4).square(), positive(2, 3, seed=1)),
        Dense(positive(12), (3, 4)),
        Diagonal(draw(2, 3, 4).square()),
    ]
    if rule is not exact:
        blocks.append(ScaledKronecker.from_moments(positive(2, 4), positive(2, 3, seed=1)))
    if rule is factored:
        sides = positive(2, 4), positive(2, 3, seed=1), positive(2, 4, seed=2), positive(2, 3, seed=3)
        blocks.append(KroneckerSum(*sides))
    for block in blocks:
        shift, v = rule(block, 0.3), draw(*block.shape, seed=5)
        torch.testing.assert_close(Damped.of(block, shift).matmul(block.factorise(shift).apply(v)), v)
    with pytest.raises(TypeError, match="a ScaledKronecker block with the shift Rescaled"):
        Damped.of(ScaledKronecker.from_moments(positive(4), positive(3)), Rescaled(*torch.ones(3).double().unbind()))


def test_curvature_through_batch_norm_is_for_so_alone() -> None:
    x = draw(12, 3)
    for variant, solve in (("so", "stein"), ("q", "stein"), ("q", "reweighted")):
        model = double(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
        optimizer = make(
            model, 20.0, variant=variant, solve=solve, approximation="xkfac", momentum=0.3, source="sampled"
        )
        losses = []
        for _ in range(25):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), torch.arange(12) % 3)
            loss.backward()
            if variant == "q":
                with pytest.raises(
                    TypeError, match=rf"layer '.*': KLDWRM with solve='{solve}' .* or solve='iterative'"
                ):
                    optimizer.step()
                break
            optimizer.step()
            losses.append(float(loss.detach()))
        assert not losses or losses[-1] < 0.8 * losses[0]


def test_sums_of_four_products_are_solved_iteratively() -> None:
    """Curvature through batch norm, ``F̄`` and ``B`` two products each: the step solves its equation."""
    x = draw(12, 3)
    model = double(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    optimizer = make(model, 2.0, variant="q", solve="iterative", approximation="xkfac", source="sampled", rho=0.6)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(12) % 3).backward()
        optimizer.step()
    assert any(isinstance(optimizer._average_of(name).block, KroneckerSum) for name in optimizer._inverses)
    for name, inverse in optimizer._inverses.items():
        assert isinstance(inverse, IterativeSum)
        average, newest = optimizer._average_of(name), optimizer._model[name]
        v = draw(*inverse.shape, seed=3)
        solved = inverse.apply(v)
        assert relative(average.matmul(solved) + newest.matmul(solved) / 2.0, v) <= 1e-10
        assert inverse.iterations < inverse.shape.numel()
        with pytest.raises(NotImplementedError, match="has no log-determinant"):
            inverse.logdet()


def test_an_iterative_solve_that_does_not_converge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kronfac.optim.iterative_sum._ITERATIONS", 2)
    left, right = Dense(positive(30), torch.Size([1, 30])), Dense(positive(30, seed=1), torch.Size([1, 30]))
    inverse = IterativeSum(Damped(left, 1e-3), Damped(right), 1.0, "fc")
    with pytest.raises(torch.linalg.LinAlgError, match=r"layer 'fc': solve='iterative' ended .* raise damping or lam"):
        inverse.apply(draw(1, 30))


class Poisson(kf.Likelihood):
    def nll(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs.exp() - labels * outputs

    def sample_labels(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.poisson(outputs.exp(), generator)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rho": 1.0}, ValueError, r"rho=1\.0 must be a number in \[0, 1\)"),
        ({"rho": -0.1}, ValueError, r"rho=-0\.1 must be a number >= 0"),
        ({"lam": 0.0}, ValueError, r"lam=0\.0 must be a number > 0"),
        ({"lam": -1.0}, ValueError, r"lam=-1\.0 must be a number > 0"),
        ({"n_cap": 0}, ValueError, "n_cap=0 must be an integer >= 1"),
        ({"n_inner": -1}, ValueError, "n_inner=-1 must be an integer >= 0"),
        ({"omega": 0.0}, ValueError, r"omega=0\.0 must be a number > 0"),
        ({"zeta": float("nan")}, ValueError, "zeta=nan must be a number > 0"),
        ({"xi": 1.5}, ValueError, r"xi=1\.5 must be a number in \[0, 1\]"),
        ({"rms_clip": 0.0}, ValueError, r"rms_clip=0\.0 must be a number > 0"),
        ({"variant": "woqm"}, ValueError, r"variant='woqm' is unknown; choose one of \('so', 'q', 'qe'\)"),
        ({"solve": "cg"}, ValueError, "solve='cg' is unknown"),
        ({"kl_product": "none"}, ValueError, "kl_product='none' is unknown"),
        ({"lr": 0.1, "ema": 0.5}, TypeError, "KLDWRM takes no ema and lr"),
        ({"approximation": "ekfac"}, ValueError, "does not support approximation='ekfac'"),
        ({"approximation": "kfac_tridiagonal"}, (TypeError, ValueError), "kfac_tridiagonal"),
        ({"variant": "q", "damping_rule": "exact", "approximation": "kfac"}, ValueError, "damping_rule='exact'"),
        ({"variant": "qe", "momentum": 0.9}, ValueError, "takes no momentum"),
        ({"variant": "qe", "fallback": torch.optim.SGD}, ValueError, "takes no fallback"),
        ({"model_approximation": "diagonal"}, ValueError, "variant='so' has no quadratic model"),
        ({"variant": "q", "model_approximation": "diagonal"}, ValueError, "set solve='iterative'"),
        (
            {"variant": "q", "model_approximation": "diagonal", "solve": "iterative", "stats_every": 2},
            ValueError,
            "needs stats_every=1, not 2",
        ),
        (
            {"variant": "q", "model_approximation": "ekfac", "solve": "iterative"},
            ValueError,
            "does not support model_approximation='ekfac'",
        ),
        (
            {"variant": "q", "model_approximation": "kfac_tridiagonal", "solve": "iterative"},
            ValueError,
            "does not support model_approximation='kfac_tridiagonal', which couples layers",
        ),
        ({"typo": 1}, TypeError, "unknown options"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(network(), **options)


def test_what_the_variants_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="which Poisson does not give: implement its symmetric_kl"):
        kf.optim.KLDWRM(network(), Poisson(), variant="qe")
    with pytest.raises(ValueError, match=r"needs the targets at each step.*set stats_every=1"):
        kf.optim.KLDWRM(network(), kf.Categorical(ignore_index=0), variant="qe")
    with pytest.warns(UserWarning, match=r"rho\*\*n_cap = 0\.25 of the wake is dropped"):
        make(network(), variant="qe", n_cap=2)
    embedding = double(nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(4, 3)))
    with pytest.raises(ValueError, match="no solve for the embedding '0'"):
        make(embedding, variant="q", approximation="kfac")
    optimizer = make(network(), variant="qe")
    with pytest.raises(TypeError, match="needs a closure"):
        optimizer.step()
    model = network()
    optimizer = make(model, variant="qe")
    x, y = batch(0)
    with pytest.raises(RuntimeError, match="called the model 2 times"):
        optimizer.step(lambda: F.cross_entropy(model(x), y) + F.cross_entropy(model(x), y))


def test_a_layer_with_two_rates_is_refused_by_q_and_taken_by_so() -> None:
    for variant in ("so", "q"):
        model = network()
        weights, biases = ([p for n, p in model.named_parameters() if n.endswith(kind)] for kind in ("weight", "bias"))
        optimizer = make(model, variant=variant, param_groups=[{"params": weights}, {"params": biases, "lr": 0.01}])
        if variant == "so":
            loop(model, optimizer, range(2), variant)
        else:
            with pytest.raises(ValueError, match="needs one lr = 1/λ for all of layer '0'"):
                loop(model, optimizer, range(1), variant)


def test_foreign_states_are_refused() -> None:
    plain = kf.optim.KFAC(network(), kf.Categorical(), 0.1)
    optimizer = make(network())
    with pytest.raises(ValueError, match="no state of KLDWRM"):
        optimizer.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="variant='so', the optimiser of 'q'"):
        make(network(), variant="q").load_state_dict(optimizer.state_dict())
    model = network()
    qe = make(model, variant="qe")
    loop(model, qe, range(2), "qe")
    state = qe.state_dict()
    state["kldwrm"]["networks"][0]["parameters"]["0.weight"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"a parameter '0\.weight' of shape"):
        qe.load_state_dict(state)
