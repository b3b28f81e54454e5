"""`KLDWRM`: reductions of the loss, sparse gradients, steps that fail, and averages that leave no trace."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw, relative
from tests.optim.hand_kfac import network
from tests.optim.loops import batch
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.estimator import Estimator
from kronfac.tape import record

#: Of a mini-batch of `batch`, and of three outputs for each.
EXAMPLES, OUTPUTS = 8, 3


def make(model: nn.Module, likelihood: kf.Likelihood | None = None, lam: float = 3.0, **options: Any) -> Any:
    options = {"source": "exact", "damping": 0.1, "stats_every": 1, "kl_clip": None, **options}
    return kf.optim.KLDWRM(model, likelihood or kf.Categorical(), lam, **options)


def step(model: nn.Module, optimizer: kf.optim.KLDWRM, number: int, loss: Any = F.cross_entropy) -> float:
    x, y = batch(number)
    if optimizer._variant == "qe":
        return float(optimizer.step(lambda: loss(model(x), y)))
    optimizer.zero_grad()
    value = loss(model(x), y)
    value.backward()
    optimizer.step()
    return float(value.detach())


def vector(model: nn.Module) -> Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


# --------------------------------------------------------------------------------------------------------- reductions
def one_hot(y: Tensor) -> Tensor:
    return F.one_hot(y, OUTPUTS).double()


@pytest.mark.parametrize("family", [kf.Categorical, kf.Bernoulli])
@pytest.mark.parametrize("options", [{}, {"rms_clip": 0.02}, {"kl_clip": "auto"}, {"variant": "q"}, {"variant": "so"}])
def test_steps_do_not_depend_on_the_reduction(family: type[kf.Likelihood], options: dict[str, Any]) -> None:
    """With a damping in the units of the loss; a Bernoulli has three terms for each example."""
    options = {"variant": "qe", "zeta": 1.0, "omega": 0.3, **options}
    terms = EXAMPLES * (OUTPUTS if family is kf.Bernoulli else 1)
    found = []
    for reduction, units in (("mean", 1.0), ("sum", float(terms)), ("batchmean", terms / EXAMPLES)):
        model, likelihood = network(), family(reduction=reduction)
        optimizer = make(model, likelihood, damping=0.01 * units, weight_decay=1e-3 * units, **options)

        def loss(z: Tensor, y: Tensor, likelihood: kf.Likelihood = likelihood) -> Tensor:
            return likelihood.loss(z, one_hot(y) if isinstance(likelihood, kf.Bernoulli) else y)

        losses = [step(model, optimizer, k, loss) / units for k in range(6)]
        found.append((torch.tensor(losses), vector(model)))
    for losses, parameters in found[1:]:
        assert relative(losses, found[0][0]) <= 1e-10
        assert relative(parameters, found[0][1]) <= 1e-10


def test_ignored_terms_are_not_counted_in_the_inner_rate() -> None:
    x, y = batch(0)
    y = torch.where(y == 0, -1, y)
    found = []
    for reduction, units in (("mean", 1.0), ("sum", float((y != -1).sum()))):
        model = network()
        likelihood = kf.Categorical(ignore_index=-1, reduction=reduction)
        optimizer = make(model, likelihood, variant="qe", zeta=1.0, omega=0.3, damping=0.01 * units)

        def loss(model: Any = model, optimizer: Any = optimizer, likelihood: Any = likelihood) -> Tensor:
            with optimizer.capture() as capture:
                z = model(x)
                capture(z, y)
            return likelihood.loss(z, y)

        for _ in range(4):
            optimizer.step(loss)
        found.append(vector(model))
    assert relative(found[1], found[0]) <= 1e-10


# --------------------------------------------------------------------------------------------------- sparse gradients
class Tokens(nn.Module):
    """A linear layer on embeddings without curvature, since their gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(6, 3, sparse=True), nn.Linear(3, 3)
        double(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.table(x.sum(1).long().abs() % 6).tanh())
        return out


@pytest.mark.parametrize("variant", ["so", "q", "qe"])
@pytest.mark.parametrize("options", [{}, {"rho": 0.0}, {"weight_decay": 0.1, "kl_clip": "auto", "rms_clip": 0.1}])
def test_sparse_gradients_are_those_that_they_stand_for(variant: str, options: dict[str, Any]) -> None:
    found = []
    for sparse in (True, False):
        model = Tokens()
        with pytest.warns(kf.CoverageWarning, match="without curvature"):
            optimizer = make(model, variant=variant, zeta=1.0, **options)
        model.table.sparse = sparse
        before = vector(model)
        losses = [step(model, optimizer, k % 2) for k in range(12)]
        assert losses[-2] < losses[0]
        assert not torch.equal(vector(model)[:18], before[:18])
        found.append(vector(model))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-13)


# --------------------------------------------------------------------------------------------------- steps that fail
def overflow_within(patch: pytest.MonkeyPatch, optimizer: Any) -> None:
    patch.setattr(optimizer, "_inner", (1e9, 400))


def stop_solving(patch: pytest.MonkeyPatch, optimizer: Any) -> None:
    patch.setattr("kronfac.optim.iterative_sum._REFUSED", {torch.float64: -1.0})


def interrupt(patch: pytest.MonkeyPatch, optimizer: Any) -> None:
    patch.setattr("kronfac.optim.kldwrm.layer_scales", lambda *_: signal.raise_signal(signal.SIGINT))


def interrupt_early(patch: pytest.MonkeyPatch, optimizer: Any) -> None:
    patch.setattr(optimizer, "_renew_inverses", lambda: signal.raise_signal(signal.SIGINT))


FAILURES = [
    ({"variant": "qe"}, overflow_within),
    ({"variant": "q", "solve": "iterative", "rho": 0.7}, stop_solving),
    ({"variant": "so", "momentum": 0.5}, interrupt),
    ({"variant": "q"}, interrupt_early),
]
# Between two gatherings there is nothing to iterate on.
CASES = [(*failure, at) for failure in FAILURES for at in (0, 2, 3, 4) if failure[1] is not stop_solving or at != 3]


@pytest.mark.parametrize(("options", "spoil", "at"), CASES)
def test_a_step_that_fails_leaves_its_batch_out_of_the_averages(
    options: dict[str, Any], spoil: Callable[[pytest.MonkeyPatch, Any], None], at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is repeated, in the same run or in one that is resumed from there."""
    options = {"stats_every": 2, "burn_in": 0, "kl_clip": "auto", **options}
    model, twin = network(), network()
    optimizer, other = make(model, **options), make(twin, **options)
    for k in range(at):
        step(model, optimizer, k)
        step(twin, other, k)
    before, average = vector(model), optimizer.curvature().to_dense() if at else None
    with monkeypatch.context() as patch:
        spoil(patch, optimizer)
        with pytest.raises((FloatingPointError, torch.linalg.LinAlgError, KeyboardInterrupt)):
            step(model, optimizer, at)
    assert torch.equal(vector(model), before)
    assert average is None or torch.equal(optimizer.curvature().to_dense(), average)
    resumed_model = copy.deepcopy(model)
    resumed = make(resumed_model, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for k in range(at, at + 3):
        for each in ((model, optimizer), (twin, other), (resumed_model, resumed)):
            step(*each, k)
    for net, each in ((model, optimizer), (resumed_model, resumed)):
        assert torch.equal(each.curvature().to_dense(), other.curvature().to_dense())
        assert torch.equal(vector(net), vector(twin))


def test_a_loss_without_parameters_is_refused() -> None:
    model, free = network(), torch.ones(1, requires_grad=True)
    optimizer = make(model, variant="qe")
    with pytest.raises(ValueError, match="the loss depends on no parameter"):
        optimizer.step(lambda: model(batch(0)[0]).detach().sum() * free)


class Branch(nn.Module):
    """Calls its second layer when asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.whole = nn.Linear(3, 3), nn.Linear(3, 3), False
        double(self)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.first(x).tanh()
        return self.second(hidden) if self.whole else hidden


def test_a_layer_that_comes_late_has_the_average_of_its_own_batches() -> None:
    model = Branch()
    optimizer = make(model)
    for k in range(3):
        model.whole = k == 2
        wanted = kf.estimate(model, kf.Categorical(), (batch(k)[0], None), source="exact") if model.whole else None
        step(model, optimizer, k)
    assert wanted is not None
    found = optimizer.curvature().blocks["second"].to_dense()
    torch.testing.assert_close(found, wanted.blocks["second"].to_dense(), rtol=1e-12, atol=0.0)


# ------------------------------------------------------------------------------------------------------------- resets
@pytest.mark.parametrize("approximation", ["kfac", "diagonal", "tkfac"])
def test_a_reset_leaves_no_trace(approximation: str) -> None:
    model, likelihood = network(), kf.Categorical()
    used, fresh = (Estimator(model, likelihood, approximation=approximation, source="exact") for _ in range(2))
    for estimator, inputs in ((used, (1e9 * draw(8, 3), draw(8, 3, seed=1))), (fresh, (draw(8, 3, seed=1),))):
        for x in inputs:
            estimator.reset()
            with record(estimator.adaptation.adapters) as tape:
                estimator.update(tape, model(x))
    assert torch.equal(used.curvature().to_dense(), fresh.curvature().to_dense())
    used.reset()
    assert all(statistic.empty for statistic in used.statistics.values())


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("b", ["kfac", "diagonal"])
def test_a_model_of_its_own_structure_resumes_bit_for_bit(b: str, stop: int) -> None:
    """Also where batches differ so much that a trace of an old one in ``B`` would show."""

    def loop(model: nn.Module, optimizer: kf.optim.KLDWRM, steps: range) -> None:
        for k in steps:
            x, y = batch(k)
            optimizer.zero_grad()
            F.cross_entropy(model(x * 1e6 ** (k % 2)), y).backward()
            optimizer.step()

    options = {"variant": "q", "solve": "iterative", "model_approximation": b, "damping": 1e-3, "source": "sampled"}
    model = network()
    optimizer = make(model, rho=0.0, **options)
    loop(model, optimizer, range(stop))
    other = copy.deepcopy(model)
    resumed = make(other, rho=0.0, **options)
    resumed.load_state_dict(optimizer.state_dict())
    loop(model, optimizer, range(stop, stop + 3))
    loop(other, resumed, range(stop, stop + 3))
    assert torch.equal(vector(model), vector(other))
