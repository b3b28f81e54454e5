"""KFAC whose products are rounded to bfloat16: the run in float32, to the precision that is measured."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.linalg.test_rounded import in_range
from tests.optim.test_state import assert_same_state, through_a_file
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.experiments.optimizers import get_optimizer
from kronfac.layers import adapt
from kronfac.optim import reduced
from kronfac.optim.directions import directions
from kronfac.optim.reduced import RoundedDirections

#: By rows, of which there are fewer than the layer is wide.
ROWS: dict[str, Any] = {"gradients": "rows", "kl_clip": None, "lr": 0.005}
OPTIONS: dict[str, Any] = {"products": "bfloat16", "stats_every": 1, "invert_every": 4, "damping": 1e-2}


@pytest.fixture(autouse=True)
def _pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies bfloat16; others do it slowly."""
    monkeypatch.setattr(reduced, "pays_on", lambda device: True)


def network() -> nn.Module:
    """Three layers, of which the one in the middle is wide enough."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 140), nn.Tanh(), nn.Linear(140, 130), nn.Tanh(), nn.Linear(130, 3))


def make(model: nn.Module, **options: Any) -> kf.optim.KFAC:
    return kf.optim.KFAC(model, kf.Categorical(), **{"lr": 0.05, "damping": 0.1, **options})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(50, 20, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()


def parameters(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize(
    "extra", [{}, {"asynchronous": 2}, {"approximation": "tkfac"}, {"inverse": "newton_schulz"}, ROWS]
)
def test_thirty_steps_are_nearly_those_in_float32(extra: dict[str, Any]) -> None:
    model, plain = network(), network()
    start = parameters(model).clone()
    ours = make(model, **OPTIONS, **extra)
    theirs = make(plain, **{**OPTIONS, **extra, "products": "float32"})
    train(model, ours, range(30))
    train(plain, theirs, range(30))
    moved, apart = (
        torch.linalg.norm(parameters(plain) - start),
        torch.linalg.norm(parameters(model) - parameters(plain)),
    )
    assert moved > 0.1
    assert 0 < apart < 0.02 * moved  # it was used, and it does not matter
    cosines = {name: h.cosine for name, h in ours.health().items()}
    assert cosines["0"] is None
    assert cosines["4"] is None
    assert cosines["2"] is not None
    assert 0.999 < cosines["2"] <= 1.0
    assert all(h.cosine is None for h in theirs.health().values())


def test_a_layer_whose_direction_is_not_kept_stays_in_float32() -> None:
    """Gradients whose spectrum does not fall, in the range of factors of deficient rank."""
    layer = nn.Linear(260, 300, bias=False)
    adapter = adapt(layer, "0")
    for decay, kept in ((0.0, False), (1.0, True)):
        gradient, output, input = (tensor.float() for tensor in in_range(300, 260, decay))
        inverses, rounded = {"0": kf.blocks.KroneckerInverse(input, output)}, RoundedDirections()
        plain = directions({"0": adapter}, inverses, {"0.weight": gradient})["0.weight"]
        for call in range(2):
            found = directions({"0": adapter}, inverses, {"0.weight": gradient}, rounded.multiply)["0.weight"]
            assert torch.equal(found, plain) == (call == 0 or not kept)
        assert (rounded.cosines["0"] > 0.99) == kept
        inverses["0"] = kf.blocks.KroneckerInverse(input, output)  # the next inverse is measured anew
        again = directions({"0": adapter}, inverses, {"0.weight": gradient}, rounded.multiply)["0.weight"]
        assert torch.equal(again, plain)


def test_rows_and_gradients_are_measured_apart() -> None:
    """A layer takes rows or its gradient by how many rows there are; each way has a cosine of its own."""
    model = network()
    optimizer = make(model, **{**OPTIONS, **ROWS, "invert_every": 100, "burn_in": 0})
    rounded = optimizer._rounded
    assert rounded is not None
    found = []
    for step, rows in enumerate([50] * 9 + [400, 50]):  # the last inverse is that of step 8
        x = torch.randn(rows, 20, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()
        found.append(sorted(rounded.cosines))
    assert found[8:] == [["2, by rows"], ["2", "2, by rows"], ["2", "2, by rows"]]
    assert optimizer.health()["2"].cosine == min(rounded.cosines.values())
    assert all(0.99 < cosine <= 1.0 for cosine in rounded.cosines.values())


def test_a_way_that_the_newest_inverse_was_not_measured_by_is_measured_in_a_resumed_run() -> None:
    def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            rows = 400 if 8 <= step < 10 else 50  # inverses are renewed at step 8
            x = torch.randn(rows, 20, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
            optimizer.step()

    model = network()
    optimizer = make(model, **OPTIONS, **ROWS)
    go_on(model, optimizer, range(8))
    assert optimizer._rounded is not None
    assert list(optimizer._rounded.cosines) == ["2, by rows"]
    go_on(model, optimizer, range(8, 10))
    assert list(optimizer._rounded.cosines) == ["2"]
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    go_on(model, optimizer, range(10, 13))
    resumed = network()
    other = make(resumed, **OPTIONS, **ROWS)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    go_on(resumed, other, range(10, 13))
    assert torch.equal(parameters(model), parameters(resumed))


def test_a_processor_without_instructions_for_it_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduced, "pays_on", lambda device: False)
    with pytest.warns(UserWarning, match="products='bfloat16': this processor has no instructions"):
        make(network(), **OPTIONS)


@pytest.mark.parametrize("extra", [{}, ROWS])
def test_a_run_whose_directions_are_never_kept_is_that_in_float32(
    monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any]
) -> None:
    monkeypatch.setattr(reduced, "COSINE", 1.1)
    model, plain = network(), network()
    optimizer = make(model, **OPTIONS, **extra)
    train(model, optimizer, range(9))
    train(plain, make(plain, **{**OPTIONS, **extra, "products": "float32"}), range(9))
    assert torch.equal(parameters(model), parameters(plain))
    assert optimizer.health()["2"].cosine is not None


@pytest.mark.parametrize("stop", [3, 6, 9])
@pytest.mark.parametrize("extra", [{}, {"asynchronous": 2}, ROWS])
def test_a_resumed_run_is_the_run_that_never_stopped(stop: int, extra: dict[str, Any]) -> None:
    model = network()
    optimizer = make(model, **OPTIONS, **extra)
    train(model, optimizer, range(stop))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, range(stop, stop + 9))
    resumed = network()
    other = make(resumed, **OPTIONS, **extra)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, range(stop, stop + 9))
    assert torch.equal(parameters(model), parameters(resumed))
    assert_same_state(other.state_dict(), optimizer.state_dict())
    assert other.health() == optimizer.health()


def test_a_state_from_before_the_option_is_measured_anew() -> None:
    model = network()
    optimizer = make(model, **OPTIONS)
    train(model, optimizer, range(6))
    state = through_a_file(optimizer.state_dict())
    del state["kronfac"]["cosines"]
    resumed = network()
    resumed.load_state_dict(model.state_dict())
    other = make(resumed, **OPTIONS)
    other.load_state_dict(state)
    assert other.health()["2"].cosine is None
    train(resumed, other, range(6, 7))
    assert other.health()["2"].cosine is not None


def test_gradients_that_are_not_finite_change_nothing() -> None:
    model = network()
    optimizer = make(model, **OPTIONS)
    train(model, optimizer, range(5))
    before = copy.deepcopy(model.state_dict())
    F.cross_entropy(model(torch.randn(50, 20)), torch.arange(50) % 3).backward()
    model.get_parameter("2.weight").grad[0, 0] = torch.nan  # type: ignore[index]
    with pytest.raises(FloatingPointError, match=r"gradient of 2\.weight"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_of_zeros_are_not_measured() -> None:
    model = network()
    optimizer = make(model, **OPTIONS)
    model(torch.randn(50, 20)).sum().mul(0.0).backward()
    optimizer.step()
    assert optimizer.health()["2"].cosine is None


def test_what_it_does_not_fit_is_refused() -> None:
    narrow = nn.Sequential(nn.Linear(20, 140), nn.Tanh(), nn.Linear(140, 3))
    with pytest.raises(ValueError, match=r"products='bfloat16' is for layers with at least 128 inputs and outputs"):
        make(narrow, products="bfloat16")
    with pytest.raises(ValueError, match=r"products='half' is unknown; choose one of .*'bfloat16'"):
        make(network(), products="half")
    with pytest.raises(ValueError, match=r"products='bfloat16' does not fit damping_rule='exact'.*leave products out"):
        make(network(), damping_rule="exact", products="bfloat16")
    with pytest.raises(ValueError, match=r"products='bfloat16' does not fit approximation='ekfac'"):
        make(network(), approximation="ekfac", products="bfloat16")
    with pytest.raises(ValueError, match=r"products='bfloat16' does not fit AdaptiveKFAC"):
        kf.optim.AdaptiveKFAC(network(), kf.Categorical(), products="bfloat16")
    model = network()
    with pytest.raises(ValueError, match=r"products='bfloat16' is for the inverses of Kronecker factors"):
        train(model, make(model, approximation="diagonal", products="bfloat16"), range(1))


def test_the_command_line_has_the_option() -> None:
    spec = get_optimizer("kfac")
    assert spec.resolve({"products": "bfloat16"})["products"] == "bfloat16"
