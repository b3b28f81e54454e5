"""Samples that wait for each other are looked at together, and none is taken before."""

from __future__ import annotations

import pytest
import torch
from tests.exactness_helpers import draw
from torch import nn

import kronfac as kf
from kronfac.estimator import Estimator
from kronfac.layers import adapt
from kronfac.sources import Sample, base
from kronfac.sources.checked import Checked
from kronfac.tape import record


def sample(name: str, value: float = 1.0) -> Sample:
    cotangent = torch.full((4, 2), value)  # 32 bytes
    return Sample(adapt(nn.Linear(3, 2), name), torch.ones(4, 3), cotangent, 1.0, 1.0, 4, True)


def test_they_are_handed_on_in_order_once_enough_wait() -> None:
    taken: list[Sample] = []
    checked = Checked(taken.append, held=64)
    for name in "abc":
        checked(sample(name))
    assert [s.layer.name for s in taken] == ["a", "b"]
    checked.flush()
    assert [s.layer.name for s in taken] == ["a", "b", "c"]
    assert all(s.checked for s in taken)
    checked.flush()
    assert len(taken) == 3


def test_without_waiting_whoever_takes_them_looks() -> None:
    taken: list[Sample] = []
    checked = Checked(taken.append, held=0)
    checked(sample("a", torch.nan))
    assert not taken[0].checked


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_none_of_those_that_wait_is_taken_if_one_is_not_finite(value: float) -> None:
    taken: list[Sample] = []
    checked = Checked(taken.append, held=64)
    checked(sample("a"))
    with pytest.raises(FloatingPointError, match="NaN or Inf in the cotangent of layer 'b'"):
        checked(sample("b", value))
    assert not taken


@pytest.mark.parametrize("held", [1, 200, 1 << 20])
@pytest.mark.parametrize("approximation", ["kfac", "tkfac", "ekfac", "dense"])
def test_statistics_are_the_same_however_many_wait(
    monkeypatch: pytest.MonkeyPatch, approximation: str, held: int
) -> None:
    found = []
    for waits in (0, held):
        monkeypatch.setattr(base, "held_on", lambda device, waits=waits: waits)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
        estimator = Estimator(
            model, kf.Categorical(), approximation=approximation, generator=torch.Generator().manual_seed(0)
        )
        with record(estimator.adaptation.adapters) as tape:
            out = model(draw(6, 3))
        estimator.update(tape, out)
        found.append({n: m.value() for s in estimator.statistics.values() for n, m in s.means().items()})
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name])
