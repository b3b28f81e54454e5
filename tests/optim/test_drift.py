"""Inverses that are renewed when the factors have moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw
from tests.optim.hand_kfac import network
from tests.optim.unclipped import unclipped
from torch import nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.damping import factored
from kronfac.optim.drift import largest_drift

LABELS = torch.arange(24) % 3


def make(model: nn.Module, **options: Any) -> kf.optim.KFAC:
    options = {"damping": 0.1, "stats_every": 1, "invert_every": 100, "ema": 0.0, "source": "exact", **options}
    return unclipped(model, kf.Categorical(), lr=0.0, **options)


def ages(drift: float | None, scale: float) -> list[int]:
    """Age of the first layer's inverse after each step; from the tenth on inputs are larger."""
    model = network()
    optimizer, found = make(model, drift=drift), []
    for step in range(14):
        optimizer.zero_grad()
        F.cross_entropy(model(draw(24, 3) * (scale if step >= 10 else 1.0)), LABELS).backward()
        optimizer.step()
        age = optimizer.health()["0"].age
        assert age is not None
        found.append(age)
    return found


def test_inverses_are_renewed_when_the_factors_move_and_then_not_again() -> None:
    plain = ages(None, 3.0)
    assert plain[8:] == [1, 2, 3, 4, 5, 6]  # at 8, on the way to 100
    assert ages(0.5, 1.0) == plain  # the same data: no drift
    assert ages(0.5, 3.0)[8:] == [1, 2, 1, 2, 3, 4]
    assert ages(1e6, 3.0) == plain


def test_the_measure_is_the_mean_relative_change_of_eigenvalues() -> None:
    model = double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    optimizer = make(model)
    factors = []
    for scale in (1.0, 1.7):
        F.cross_entropy(model(draw(24, 3) * scale), LABELS).backward()
        if scale == 1.0:
            optimizer.step()
        factors.append({name: (b.input, b.output) for name, b in optimizer.curvature().blocks.items()})  # type: ignore[attr-defined]
    wanted = []
    for name, block in optimizer.curvature().blocks.items():
        old = kf.blocks.Kronecker(*factors[0][name])
        shifts = factored(old, 0.1), factored(block, 0.1)
        for side, before, after in zip(("input", "output"), factors[0][name], factors[1][name], strict=True):
            eye = torch.eye(len(before), dtype=before.dtype)
            damped = [f + getattr(s, side) * eye for f, s in zip((before, after), shifts, strict=True)]
            wanted.append(abs(float(torch.linalg.solve(damped[0], damped[1]).trace()) / len(before) - 1))
    found = largest_drift(optimizer._inverses, optimizer._estimator.statistics, lambda name: 0.1, factored)
    assert found == pytest.approx(max(wanted), rel=1e-10)


@pytest.mark.parametrize("scheme", ["normal", "trace_restricted"])
def test_drift_of_tkfac(scheme: str) -> None:
    model = double(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)))
    options: dict[str, Any] = {"damping": 0.1, "stats_every": 1, "ema": 0.0, "source": "exact", "kl_clip": None}
    optimizer = kf.optim.TKFAC(model, kf.Categorical(), 0.0, drift=0.3, scheme=scheme, **options)
    found = []
    for step in range(12):
        optimizer.zero_grad()
        F.cross_entropy(model(draw(24, 1, 6, 6) * (5.0 if step >= 10 else 1.0)), LABELS).backward()
        optimizer.step()
        found.append(optimizer.health()["0"].age)
        now = largest_drift(
            optimizer._inverses, optimizer._estimator.statistics, optimizer._damping, optimizer._rules()
        )
        assert now < 1e-10, "the data are those that were inverted"
    assert found[8:] == [1, 2, 1, 2]


@pytest.mark.parametrize("value", [0.0, -1.0, "much"])
def test_bad_values(value: Any) -> None:
    with pytest.raises(ValueError, match="drift"):
        make(network(), drift=value)


def test_what_has_no_kronecker_inverse_is_refused() -> None:
    model = network()
    optimizer = make(model, approximation="dense", drift=0.3)
    F.cross_entropy(model(draw(24, 3)), LABELS).backward()
    optimizer.step()
    F.cross_entropy(model(draw(24, 3)), LABELS).backward()
    with pytest.raises(ValueError, match="Kronecker factors"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"drift=0\.3 does not fit KLDWRM"):
        kf.optim.KLDWRM(network(), kf.Categorical(), drift=0.3)
