"""What QE-KLD-WRM does within a step, as the page on KLD-WRM shows it.

Writes ``docs/assets/kldwrm-qe.png``. Left: the objective (31) of one step of the network of Puiu (2022) on the embedded
digits, minus its value at the Q step, against the iterations within the step, for several ω. Middle: how far the step
ends from the Q step, relative to its length, against λ; logistic regression with exact curvature and no damping, where
the two differ by what the quadratic model of the divergence misses alone. Right: how far the Q step by re-weighted
factors is from the exact one, relative to its length; a network of three layers with K-FAC's factors.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.experiments.problems import Data, Problem, get_problem
from kronfac.plots import COLOURS
from kronfac.plots.style import dress

TARGET = Path(__file__).parent.parent / "assets" / "kldwrm-qe.png"
OMEGAS = (0.01, 0.07, 0.3, 1.0, 3.0)
LAMBDAS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)
INNER = 30


def objectives(steps: int = 20) -> dict[float, list[float]]:
    """The objective at each iteration within the step after some steps, by ω; all from the same state.

    Args:
        steps: Steps before it.

    Returns:
        Values of (31) over ``λ``, minus the first.
    """
    problem = get_problem("digits-puiu")
    data, model = problem.data(), problem.model(0)

    def make(model: nn.Module, omega: float, inner: int) -> kf.optim.KLDWRM:
        return kf.optim.KLDWRM(
            model, problem.likelihood(), 100.0, variant="qe", rho=0.5, omega=omega, n_inner=inner, zeta=1.0,
            damping=1e-2, stats_every=5, kl_clip=None, rms_clip=0.02,
        )  # fmt: skip

    torch.manual_seed(0)
    optimizer = make(model, 0.01, 10)
    for step in range(steps):
        rows = slice(512 * (step % 2), 512 * (step % 2) + 512)
        x, y = data.train_inputs[rows], data.train_targets[rows]
        optimizer.step(lambda x=x, y=y: problem.loss(model(x), y))
    found = {}
    for omega in OMEGAS:
        twin = copy.deepcopy(model)
        other = make(twin, omega, INNER)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        torch.manual_seed(1)  # one dropout mask for all
        x, y = data.train_inputs[:512], data.train_targets[:512]
        other.step(lambda x=x, y=y, twin=twin: problem.loss(twin(x), y))
        found[omega] = [value - other.inner_objectives[0] for value in other.inner_objectives]
    return found


def distances(steps: int = 4, inner: int = 300) -> list[float]:
    """Distance of the QE step from the Q step over the latter's length, by λ.

    Args:
        steps: Q steps before it, so that there is a wake.
        inner: Iterations within the step.

    Returns:
        A number for each of `LAMBDAS`.
    """
    data = get_problem("digits-cnn").data()
    x = F.avg_pool2d(data.train_inputs[:600], 2).flatten(1).double()
    x = x - x.mean(0)
    x = x @ torch.linalg.svd(x, full_matrices=False).Vh[:6].mT
    x, y = x / x.std(0), F.one_hot(data.train_targets[:600] % 2, 2).double()
    likelihood, found = kf.Bernoulli(reduction="batchmean"), []
    for lam in LAMBDAS:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 2)).double()

        def make(model: nn.Module, inner: int, lam: float = lam) -> kf.optim.KLDWRM:
            return kf.optim.KLDWRM(
                model, likelihood, lam, variant="qe", approximation="dense", source="exact", damping=0.0, zeta=1.0,
                rho=0.5, stats_every=1, omega=0.5, n_inner=inner, n_cap=30, kl_clip=None,
            )  # fmt: skip

        optimizer = make(model, 0)
        for _ in range(steps):
            optimizer.step(lambda model=model: likelihood.loss(model(x), y))
        ends = []
        for count in (0, inner):
            twin = copy.deepcopy(model)
            other = make(twin, count)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            other.step(lambda twin=twin: likelihood.loss(twin(x), y))
            ends.append(vector(twin) - vector(model))
        found.append(float((ends[1] - ends[0]).norm() / ends[0].norm()))
    return found


def reweighting(before: int = 12, seeds: int = 5) -> list[list[float]]:
    """Distance of the re-weighted Q step from the Stein step over the latter's length, by λ and seed.

    Args:
        before: Q steps before it.
        seeds: How many networks.

    Returns:
        A list over seeds for each of `LAMBDAS`.
    """
    problem = get_problem("digits-mlp")
    data, found = problem.data(), []
    for lam in LAMBDAS:
        found.append([])
        for seed in range(seeds):
            model, generator = problem.model(seed).double(), torch.Generator().manual_seed(seed)
            optimizer = _q(model, problem.likelihood(), lam, "stein")
            for _ in range(before):
                _step(problem, model, optimizer, data, generator)
            ends, drawn = [], generator.get_state()
            for solve in ("stein", "reweighted"):
                twin = copy.deepcopy(model)
                other = _q(twin, problem.likelihood(), lam, solve)
                other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                generator.set_state(drawn)
                _step(problem, twin, other, data, generator)
                ends.append(vector(twin) - vector(model))
            found[-1].append(float((ends[1] - ends[0]).norm() / ends[0].norm()))
    return found


def _q(model: nn.Module, likelihood: kf.Likelihood, lam: float, solve: str) -> kf.optim.KLDWRM:
    return kf.optim.KLDWRM(
        model, likelihood, lam, variant="q", solve=solve, rho=0.5, damping=1e-2, stats_every=1, kl_clip=1e-2
    )


def _step(
    problem: Problem, model: nn.Module, optimizer: kf.optim.KLDWRM, data: Data, generator: torch.Generator
) -> None:
    rows = torch.randint(len(data.train_inputs), (100,), generator=generator)
    optimizer.zero_grad()
    problem.loss(model(data.train_inputs[rows].double()), data.train_targets[rows]).backward()
    optimizer.step()


def vector(model: nn.Module) -> Tensor:
    """All parameters.

    Args:
        model: The model.

    Returns:
        One vector.
    """
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def main() -> None:
    """Compute and draw."""
    from matplotlib.figure import Figure

    warnings.simplefilter("error")
    inner, far, apart = objectives(), distances(), reweighting()
    figure = Figure(figsize=(13.2, 3.8), dpi=150, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for colour, (omega, values) in zip(COLOURS, inner.items(), strict=False):
        left.plot(values, color=colour, label=f"ω = {omega:g}", linewidth=1.4)
        falls = all(after < before for before, after in pairwise(values))
        how = "falls at every iteration" if falls else "does not fall throughout"
        print(f"ω = {omega:g}: from 0 to {values[-1]:.3g}; {how}")
    smallest = min(values[-1] for values in inner.values())
    left.set_ylim(1.1 * smallest, -0.8 * smallest)
    middle.loglog(LAMBDAS, far, "o-", color=COLOURS[0], label="QE against Q")
    middle.loglog(LAMBDAS, [far[-1] * LAMBDAS[-1] / lam for lam in LAMBDAS], "--", color="#888888", label="∝ 1/λ")
    print(
        "relative distance by λ:", ", ".join(f"{lam:g}: {value:.2g}" for lam, value in zip(LAMBDAS, far, strict=True))
    )
    medians = [statistics.median(values) for values in apart]
    right.loglog(LAMBDAS, medians, "o-", color=COLOURS[0], label="re-weighted against Stein")
    right.fill_between(
        LAMBDAS, [min(v) for v in apart], [max(v) for v in apart], color=COLOURS[0], alpha=0.2, linewidth=0
    )
    right.loglog(LAMBDAS, [medians[-1] * LAMBDAS[-1] / lam for lam in LAMBDAS], "--", color="#888888", label="∝ 1/λ")
    print("re-weighted by λ:", ", ".join(f"{lam:g}: {value:.2g}" for lam, value in zip(LAMBDAS, medians, strict=True)))
    for axes in (left, middle, right):
        axes.legend(frameon=False)
    dress(left, "QE within one step", "iterations", "objective (31) over λ, less the start's")
    dress(middle, "QE after 300 iterations", "λ", "distance from the Q step")
    dress(right, "Q by re-weighted factors", "λ", "distance from the exact Q step")
    figure.savefig(TARGET)


if __name__ == "__main__":
    main()
