"""Inverses computed beside the steps: the same run every time, and the inverses of the step that asked for them."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double
from tests.optim.hand_kfac import network
from tests.optim.test_state import assert_same_state, make, through_a_file, train, vectors
from torch import Tensor, nn

import kronfac as kf
from kronfac.linalg.side_by_side import forget_workers
from kronfac.optim import background, refresh

OPTIONS: dict[str, Any] = {"asynchronous": 3, "stats_every": 1, "invert_every": 5}


def inverses(optimizer: kf.optim.KFAC) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor.clone()
        for name, inverse in optimizer._inverses.items()
        for key, tensor in inverse.tensors().items()
    }


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize("approximation", ["kfac", "dense", "diagonal", "tkfac"])
def test_inverses_of_a_step_take_effect_three_steps_later(approximation: str) -> None:
    model, plain = network(), network()
    # With lr=0 both see the same statistics whatever their inverses are.
    late = make(model, approximation=approximation, **OPTIONS)
    now = make(plain, approximation=approximation, **{**OPTIONS, "asynchronous": 0})
    for optimizer in (late, now):
        optimizer.param_groups[0]["lr"] = 0.0
    at: list[dict[str, Tensor]] = []
    wanted: list[dict[str, Tensor]] = []
    for step in range(12):
        train(model, late, vectors, range(step, step + 1))
        train(plain, now, vectors, range(step, step + 1))
        at.append(inverses(late))
        wanted.append(inverses(now))
    assert same(at[4], wanted[4])  # the first ones, at 0, 1, 2 and 4, are made at once
    assert same(at[7], wanted[4])
    assert same(at[8], wanted[5])
    assert not same(at[8], wanted[4])
    assert same(at[11], wanted[5])
    assert late.health()["0"].age == 12 - 5


@pytest.mark.parametrize("stop", [5, 6, 7, 8, 9, 11])
def test_a_run_resumed_while_inverses_are_on_their_way_is_the_run_that_never_stopped(stop: int) -> None:
    model = network()
    optimizer = make(model, **OPTIONS)
    train(model, optimizer, vectors, range(stop))
    assert (optimizer._pending is not None) == (stop in (6, 7, 8, 11))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, vectors, range(stop, stop + 8))

    resumed = network()
    other = make(resumed, **OPTIONS)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert_same_state(other.state_dict(), saved["optimizer"])
    train(resumed, other, vectors, range(stop, stop + 8))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))
    assert_same_state(other.state_dict(), optimizer.state_dict())


def test_work_is_done_in_one_thread_of_its_own_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    original = refresh._factorise

    def spy(*args: Any, **options: Any) -> Any:
        seen.append((threading.current_thread().name, torch.get_num_threads()))
        return original(*args, **options)

    monkeypatch.setattr(refresh, "_factorise", spy)
    before, elsewhere = torch.get_num_threads(), []
    model = network()
    optimizer = make(model, **OPTIONS)
    train(model, optimizer, vectors, range(9))
    assert {name.split("_")[0] for name, _ in seen} == {"MainThread", "kronfac-inverses"}
    assert {count for name, count in seen if name != "MainThread"} == {1}
    thread = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
    thread.start(), thread.join()
    assert torch.get_num_threads() == before == elsewhere[0]


@pytest.mark.parametrize("saved", [False, True])
def test_a_failure_surfaces_in_step_once_and_names_the_layer(saved: bool) -> None:
    torch.manual_seed(0)
    model = double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    optimizer = make(model, **OPTIONS)
    train(model, optimizer, vectors, range(5))
    broken = optimizer._estimator.statistics["2"].means()["input"].total
    good = broken.clone()
    broken.sub_(1e6 * torch.eye(len(broken), dtype=broken.dtype))
    train(model, optimizer, vectors, range(5, 6))
    assert optimizer._pending is not None
    optimizer._pending.copied.wait()
    broken.copy_(good)
    train(model, optimizer, vectors, range(6, 8))
    if saved:
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(torch.linalg.LinAlgError, match="input factor of layer '2'"):
        train(model, optimizer, vectors, range(8, 9))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    health = optimizer.health()
    assert (health["0"].failures, health["2"].failures) == (0, 1)
    train(model, optimizer, vectors, range(8, 12))  # with the inverses of before


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda m: make(m, asynchronous=5, invert_every=5), "less than invert_every"),
        (lambda m: make(m, asynchronous=-1), "asynchronous"),
        (lambda m: make(m, asynchronous=True), "asynchronous"),
        (lambda m: make(m, asynchronous=1, approximation="ekfac"), "eigenvectors"),
        (lambda m: kf.optim.KLDWRM(m, kf.Categorical(), lam=10.0, asynchronous=1), "KLDWRM"),
        (lambda m: kf.optim.AdaptiveKFAC(m, kf.Categorical(), asynchronous=1), "AdaptiveKFAC"),
    ],
)
def test_what_does_not_fit_is_refused_at_construction(build: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        build(network())


def test_health_counts_retries_and_knows_the_condition() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = make(model, invert_every=5)
    assert all(h.condition is h.age is None and h.retries == 0 for h in optimizer.health().values())
    train(model, optimizer, lambda step: vectors(step).float(), range(1))
    block = optimizer.curvature().blocks["0"]
    shift = optimizer._rule(block, 0.1)
    damped = [f + s * torch.eye(len(f)) for f, s in ((block.input, shift.input), (block.output, shift.output))]
    wanted = float(torch.linalg.cond(damped[0].double()) * torch.linalg.cond(damped[1].double()))
    assert optimizer.health()["0"].condition == pytest.approx(wanted, rel=1e-4)
    # A factor whose damped form is positive in float64 alone, and a good one: that of a softmax would be singular.
    for layer, total in (("0", torch.full((4, 4), 4.0)), ("2", torch.eye(3))):
        mean = optimizer._estimator.statistics[layer].means()["output"]
        mean.total.copy_(total)
        mean.weight = mean.scale = 1.0
    optimizer.param_groups[0]["damping"] = 1e-20
    optimizer._steps = 5
    optimizer._gatherer.gathered = 1
    optimizer._renew_inverses()
    assert optimizer.health()["0"].retries == 1
    assert optimizer.health()["2"].retries == 0


def test_statistics_wait_until_they_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow worker changes nothing: the next statistics and the hand-over wait for it."""
    original = refresh.damped_blocks

    def slow(*args: Any, **options: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.2)
        return original(*args, **options)

    runs = []
    for late in (False, True):
        if late:
            monkeypatch.setattr(refresh, "damped_blocks", slow)
        model = network()
        optimizer = make(model, **OPTIONS)
        train(model, optimizer, vectors, range(13))
        runs.append((model, optimizer.state_dict()))
    assert all(torch.equal(p, q) for p, q in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True))
    assert_same_state(runs[1][1], runs[0][1])


def test_the_worker_is_made_anew_in_a_forked_process() -> None:
    first = background._worker()
    forget_workers()
    assert background._worker() is not first


def test_the_thread_keeps_to_one_core_and_leaves_the_number_of_others_alone() -> None:
    before = torch.get_num_threads()
    assert background._worker().submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == before
    found: list[int] = []
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert found == [before]
