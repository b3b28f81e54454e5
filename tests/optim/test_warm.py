"""KFAC whose inverses are renewed from those of before: the run with Cholesky, to the tolerance."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double
from tests.optim.hand_kfac import network
from tests.optim.test_state import assert_same_state, images, layers, make, through_a_file, train, vectors, wide
from torch import nn

import kronfac as kf
from kronfac.experiments.optimizers import get_optimizer

OPTIONS: dict[str, Any] = {"inverse": "newton_schulz", "stats_every": 1, "invert_every": 3, "ema": 0.95}


def parameters(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize(
    ("build", "data", "options"),
    [
        (network, vectors, {}),
        (network, vectors, {"damping": 1e-2}),
        (network, vectors, {"weight_decay": 0.1, "asynchronous": 2}),
        (network, vectors, {"drift": 0.1, "invert_every": 20}),
        (layers, images, {}),
        (wide, vectors, {}),
        (network, vectors, {"approximation": "tkfac"}),
        (network, vectors, {"approximation": "tkfac", "damping_rule": "trace_restricted"}),
        (network, vectors, {"approximation": "tkfac", "damping_rule": "normal"}),
        (network, vectors, {"damping_rule": kf.damping.EachFactor(0.3)}),
    ],
)
def test_thirty_steps_are_those_with_cholesky(build: Any, data: Any, options: dict[str, Any]) -> None:
    model, plain = build(), build()
    warm = make(model, **{**OPTIONS, **options})
    cold = make(plain, **{**OPTIONS, **options, "inverse": "cholesky"})
    start = parameters(model).clone()
    train(model, warm, data, range(30))
    train(plain, cold, data, range(30))
    moved = torch.linalg.norm(parameters(plain) - start)
    assert moved > 0.1
    assert torch.linalg.norm(parameters(model) - parameters(plain)) < 1e-8 * moved
    health = warm.health()
    assert sum(h.iterations for h in health.values()) > 5
    assert all(h.iterations == h.fallbacks == 0 for h in cold.health().values())
    for inverse in warm._inverses.values():
        if isinstance(inverse, kf.blocks.KroneckerInverse):
            assert torch.equal(inverse.input, inverse.input.mT)
            assert torch.equal(inverse.output, inverse.output.mT)


def test_a_damping_that_changes_between_refreshes() -> None:
    model, plain = network(), network()
    optimizers = make(model, **OPTIONS), make(plain, **{**OPTIONS, "inverse": "cholesky"})
    for step, damping in enumerate([0.3, 0.2, 0.25, 0.1, 0.1, 0.12, 10.0, 1.0, 0.5, 0.5]):
        for net, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.param_groups[0]["damping"] = damping
            train(net, optimizer, vectors, range(3 * step, 3 * step + 3))
    torch.testing.assert_close(parameters(model), parameters(plain), rtol=1e-8, atol=1e-8)
    assert optimizers[0].health()["0"].iterations > 5


def test_tkfac_takes_it_too() -> None:
    make = partial(kf.optim.TKFAC, network(), kf.Categorical(), lr=0.05, scheme="trace_restricted")
    make()  # after which PyTorch has wrapped the class's step
    for options in ({"asynchronous": 1}, {"drift": 0.3}, {"kl_clip": None, "inverse": "newton_schulz"}):
        make(**options)
    model, plain = network(), network()
    for net, inverse in ((model, "newton_schulz"), (plain, "cholesky")):
        options = {**OPTIONS, "inverse": inverse, "source": "exact", "damping": 0.1, "kl_clip": None}
        optimizer = kf.optim.TKFAC(net, kf.Categorical(), lr=0.05, scheme="trace_restricted", **options)
        train(net, optimizer, vectors, range(20))
        assert (optimizer.health()["0"].iterations > 5) == (inverse == "newton_schulz")
    torch.testing.assert_close(parameters(model), parameters(plain), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("build", "data", "options"),
    [
        (network, vectors, {}),
        (network, vectors, {"approximation": "tkfac"}),
        (network, vectors, {"asynchronous": 2}),
        (layers, images, {"asynchronous": 2}),
        (wide, vectors, {}),
    ],
)
@pytest.mark.parametrize("stop", [4, 8])
def test_a_resumed_run_is_the_run_that_never_stopped(build: Any, data: Any, stop: int, options: dict[str, Any]) -> None:
    model = build()
    optimizer = make(model, **OPTIONS, **options)
    train(model, optimizer, data, range(stop))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, data, range(stop, stop + 9))
    resumed = build()
    other = make(resumed, **OPTIONS, **options)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, data, range(stop, stop + 9))
    assert torch.equal(parameters(model), parameters(resumed))
    assert_same_state(other.state_dict(), optimizer.state_dict())
    assert other.health() == optimizer.health()


def test_a_state_from_before_the_option_is_read() -> None:
    model = network()
    optimizer = make(model, **{**OPTIONS, "inverse": "cholesky", "asynchronous": 1})
    train(model, optimizer, vectors, range(4))
    state = through_a_file(optimizer.state_dict())
    for part in (state["kronfac"]["record"], state["kronfac"]["pending"]):
        for key in ("iterations", "fallbacks"):
            del part[key]
    resumed = network()
    other = make(resumed, **{**OPTIONS, "asynchronous": 1})
    other.load_state_dict(state)
    train(resumed, other, vectors, range(4, 12))
    assert other.health()["0"].iterations > 0


def test_health_counts_iterations_and_fallbacks() -> None:
    model = network()
    optimizer = make(model, **OPTIONS)
    train(model, optimizer, vectors, range(1))
    assert all(h.iterations == h.fallbacks == 0 for h in optimizer.health().values())  # no start, no fallback
    statistic = optimizer._estimator.statistics["0"].means()["input"].total
    statistic.mul_(torch.diag(torch.logspace(-3, 3, len(statistic), dtype=statistic.dtype)))
    optimizer._steps, optimizer._gatherer.gathered = 3, 1
    optimizer._renew_inverses()
    health = optimizer.health()
    assert health["0"].fallbacks >= 1
    assert health["2"].fallbacks == 0
    assert health["2"].iterations > 0


def test_float32_stays_close_and_failures_name_the_layer() -> None:
    model, plain = (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    warm, cold = make(model, **OPTIONS), make(plain, **{**OPTIONS, "inverse": "cholesky"})
    for net, optimizer in ((model, warm), (plain, cold)):
        train(net, optimizer, lambda step: vectors(step).float(), range(30))
    torch.testing.assert_close(parameters(model), parameters(plain), rtol=1e-3, atol=1e-3)
    assert warm.health()["0"].iterations > 5
    warm._estimator.statistics["2"].means()["input"].total[0, 0] = float("nan")
    warm._estimator.statistics["2"].means()["input"].total[1, 1] = float("nan")
    before = parameters(model).clone()
    with pytest.raises((torch.linalg.LinAlgError, ValueError, FloatingPointError), match=r"layer '2'|shift"):
        train(model, warm, lambda step: vectors(step).float(), range(30, 31))
    assert torch.equal(parameters(model), before)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda m: make(m, inverse="lu"), "inverse='lu' is unknown.*newton_schulz"),
        (lambda m: make(m, inverse="newton_schulz", damping_rule="exact"), "damping_rule='factored'"),
        (lambda m: make(m, inverse="newton_schulz", approximation="ekfac"), "approximation='ekfac'.*leave inverse out"),
        (lambda m: kf.optim.EKFAC(m, kf.Categorical(), lr=0.1, inverse="newton_schulz"), "eigenvectors"),
        (lambda m: kf.optim.KLDWRM(m, kf.Categorical(), inverse="newton_schulz"), "newton_schulz' does not fit KLDWRM"),
        (lambda m: kf.optim.AdaptiveKFAC(m, kf.Categorical(), inverse="newton_schulz"), "does not fit AdaptiveKFAC"),
    ],
)
def test_what_cannot_be_served_is_refused_at_construction(build: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(network())


@pytest.mark.parametrize("approximation", ["diagonal", "dense"])
def test_what_has_no_kronecker_factors_is_refused_at_the_first_step(approximation: str) -> None:
    model = double(network())
    with pytest.raises(ValueError, match="approximation='kfac'"):
        train(model, make(model, **OPTIONS, approximation=approximation), vectors, range(1))


def test_the_command_line_knows_it() -> None:
    for name in ("kfac", "tkfac"):
        assert get_optimizer(name).resolve({"inverse": "newton_schulz"})["inverse"] == "newton_schulz"
    with pytest.raises(kf.experiments.errors.ExperimentError, match="cholesky, newton_schulz"):
        get_optimizer("kfac").resolve({"inverse": "lu"})
    with pytest.raises(kf.experiments.errors.ExperimentError, match="no hyper-parameter 'inverse'"):
        get_optimizer("ekfac").resolve({"inverse": "cholesky"})
