"""Statistics from a forward of their own: the same numbers, whose graph is given back on the way."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.approximations.kfac import KFACStatistic
from kronfac.measuring import is_apart_from_training
from kronfac.tape import TapeError

OPTIONS: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "stats_every": 2, "invert_every": 3, "burn_in": 1}
#: With a second estimator, of another structure, fed by the same forward.
MODEL: dict[str, Any] = {"variant": "q", "solve": "iterative", "model_approximation": "diagonal", "stats_every": 1}


def network() -> nn.Module:
    """Convolutions with batch norm, and dropout, which draws masks."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(inplace=True), nn.Dropout(0.3),
        nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip


def still(model: nn.Module) -> nn.Module:
    """With batch norm as it is in use."""
    model[1].eval()  # type: ignore[operator]
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(10, 2, 6, 6, generator=torch.Generator().manual_seed(step))
    return x, x[:, 0, 0, :3].argmax(1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, accumulated: int = 1) -> None:
    torch.manual_seed(1)
    for step in range(7):
        optimizer.zero_grad()
        for part in range(accumulated):
            x, y = batch(7 * part + step)
            F.cross_entropy(model(x), y).div(accumulated).backward()
        optimizer.step()


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda m, **o: kf.optim.KFAC(m, kf.Categorical(), **OPTIONS, **o),
        lambda m, **o: kf.optim.KFAC(still(m), kf.Categorical(), **OPTIONS, source="exact", **o),
        lambda m, **o: kf.optim.KFAC(m, kf.Categorical(), **OPTIONS, kl_clip=None, asynchronous=1, **o),
        lambda m, **o: kf.optim.EKFAC(m, kf.Categorical(), **OPTIONS, **o),
        lambda m, **o: kf.optim.TKFAC(m, kf.Categorical(), **OPTIONS, **o),
        lambda m, **o: kf.optim.KLDWRM(m, kf.Categorical(), lam=20.0, damping=0.1, **MODEL, **o),
    ],
)
def test_the_run_is_that_of_the_shared_forward(make: Any, accumulated: int) -> None:
    found = []
    for stats_forward in ("shared", "own"):
        model = network()
        train(model, make(model, stats_forward=stats_forward), accumulated)
        found.append((model.state_dict(), torch.get_rng_state()))
    (mine, random), (theirs, same) = found
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)  # running statistics of batch norm too
    assert torch.equal(random, same)
    assert not torch.equal(mine["0.weight"], network().state_dict()["0.weight"])


def adaptive(precision: torch.dtype, **options: Any) -> tuple[nn.Module, kf.optim.AdaptiveKFAC, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))
    x = torch.randn(20, 8)

    def loss() -> Tensor:
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            outputs = model(x)
        return F.cross_entropy(outputs.float(), x[:, :3].argmax(1))

    return model, kf.optim.AdaptiveKFAC(model, kf.Categorical(), **options), loss


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_adaptive_kfac_takes_it(precision: torch.dtype) -> None:
    found = []
    for stats_forward in ("shared", "own"):  # with the same dropout masks, and in the same precision
        model, optimizer, loss = adaptive(precision, stats_forward=stats_forward)
        for _ in range(4):
            optimizer.step(loss)
        found.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*found)


@pytest.mark.parametrize("options", [{}, {"stats_forward": "own"}, {"stats_examples": 5}], ids=str)
def test_statistics_that_wait_are_taken_in_the_precision_of_the_forward(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    _, optimizer, loss = adaptive(torch.bfloat16, **options)
    kinds: list[tuple[torch.dtype, bool]] = []
    update = optimizer._estimator.update

    def watched(tape: Any, outputs: Tensor, *args: Any, **kwargs: Any) -> None:
        kinds.append((outputs.dtype, torch.is_autocast_enabled("cpu")))
        update(tape, outputs, *args, **kwargs)

    monkeypatch.setattr(optimizer._estimator, "update", watched)
    for _ in range(3):
        optimizer.step(loss)
    assert kinds == [(torch.bfloat16, True)] * 3


def test_statistics_that_wait_share_no_memory_with_the_training_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, loss = adaptive(torch.float32, stats_forward="own")
    training: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    def remember(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if not is_apart_from_training():
            training.append(weakref.ref(output.untyped_storage()))  # type: ignore[arg-type]

    model[1].register_forward_hook(remember)  # type: ignore[operator]
    update = optimizer._estimator.update

    def watched(*args: Any, **kwargs: Any) -> None:
        alive.extend(storage() is not None for storage in training)
        update(*args, **kwargs)

    monkeypatch.setattr(optimizer._estimator, "update", watched)
    for _ in range(3):
        optimizer.step(loss)
    assert len(alive) >= 2
    assert not any(alive)


@pytest.mark.parametrize("stats_forward", ["shared", "own"])
def test_activations_are_given_back_before_the_first_layer_is_met(
    monkeypatch: pytest.MonkeyPatch, stats_forward: str
) -> None:
    model = network()
    optimizer = kf.optim.KFAC(model, kf.Categorical(), **OPTIONS, stats_forward=stats_forward)
    kept: list[weakref.ref[Tensor]] = []
    measured: list[bool] = []

    def remember(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if is_apart_from_training() == (stats_forward == "own"):
            kept.append(weakref.ref(args[0].untyped_storage()))  # type: ignore[arg-type]

    model[4].register_forward_hook(remember)  # type: ignore[operator]
    add = KFACStatistic.add

    def watched(self: KFACStatistic, sample: Any) -> None:
        if sample.layer.name == "0":
            measured.append(kept[-1]() is not None)
        add(self, sample)

    monkeypatch.setattr(KFACStatistic, "add", watched)
    x, y = batch(0)
    loss = F.cross_entropy(model(x), y)
    assert measured == [stats_forward == "shared"]
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("source", ["sampled", "exact"])
def test_an_estimate_gives_back_as_well(source: str) -> None:
    """And is what pulls through a graph that is kept give."""
    model, data = network().eval(), [batch(step) for step in range(3)]
    given_back = kf.estimate(model, kf.Categorical(), data, source=source, seed=3)
    estimator = kf.estimator.Estimator(
        model, kf.Categorical(), source=source, generator=torch.Generator().manual_seed(3)
    )
    for x, y in data:
        with kf.tape.record(estimator.adaptation.adapters) as tape:
            outputs = model(x)
        estimator.update(tape, outputs, y)
        outputs.sum().backward()  # the graph is there
    for name, block in estimator.curvature().blocks.items():
        for key, tensor in block.tensors().items():
            assert torch.equal(tensor, given_back.blocks[name].tensors()[key])


def test_a_model_that_changes_its_input_is_refused() -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.mul_(2))

    model = Changes()
    before = copy.deepcopy(model.state_dict())
    kept = kf.optim.KFAC(model, kf.Categorical(), lr=0.1, stats_forward="own")
    with pytest.raises(TapeError, match="changes its input in place"):
        model(torch.randn(5, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert kept._gatherer.gathered == 0


def test_a_choice_that_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"stats_forward='mine' is unknown; choose one of \('shared', 'own'\)"):
        kf.optim.KFAC(network(), kf.Categorical(), lr=0.1, stats_forward="mine")
