"""``GradScaler``, autocast, and models in low precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.exactness_helpers import draw
from tests.optim.hand_kfac import network
from tests.optim.loops import MAKERS, Mixed, batch, close, train
from tests.optim.unclipped import unclipped
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf


def scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0, **options)


def test_grad_scaler_unscales_before_the_step() -> None:
    model, plain = network(), network()
    optimizer, other = (unclipped(m, kf.Categorical(), lr=0.1) for m in (model, plain))
    scaling = scaler()
    for step in range(3):
        x, y = batch(step)
        optimizer.zero_grad()
        scaling.scale(F.cross_entropy(model(x), y)).backward()
        scaling.step(optimizer)
        scaling.update()
    train(plain, other, 3)
    close(model, plain, 1e-10)


@pytest.mark.filterwarnings("ignore::kronfac.CoverageWarning")
def test_grad_scaler_reaches_the_fallback() -> None:
    model, plain = Mixed(), Mixed()
    optimizer, other = (unclipped(m, kf.Categorical(), lr=0.1, fallback=MAKERS["sgd"]) for m in (model, plain))
    scaling, (x, y) = scaler(), batch(0)
    scaling.scale(F.cross_entropy(model(x), y)).backward()
    scaling.step(optimizer)
    train(plain, other, 1)
    close(model, plain, 1e-10)


def test_grad_scaler_skips_steps_with_infinite_gradients() -> None:
    model, plain = network(), network()
    optimizer, other = (unclipped(m, kf.Categorical(), lr=0.1, source="exact", ema=0.0) for m in (model, plain))
    scaling, before = scaler(), copy.deepcopy(model)
    x, y = batch(0)
    (scaling.scale(F.cross_entropy(model(x), y)) * 1e308).backward()
    scaling.step(optimizer)
    scaling.update()
    close(model, before, 0.0)
    assert scaling.get_scale() == 512.0
    assert optimizer._steps == 0
    optimizer.zero_grad()  # the repetition gathers the same batch once more: the same mean
    scaling.scale(F.cross_entropy(model(x), y)).backward()
    scaling.step(optimizer)
    train(plain, other, 1)
    close(model, plain, 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_with_float32_factors(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    plain = copy.deepcopy(model)
    optimizer, other = (unclipped(m, kf.Categorical(), lr=0.1, damping=0.1, source="exact") for m in (model, plain))
    x, y = torch.randn(64, 3), torch.arange(64) % 3
    for m, o, enabled in ((model, optimizer, True), (plain, other, False)):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            z = m(x)
            assert z.dtype == (dtype if enabled else torch.float32)
            loss = F.cross_entropy(z, y)
        loss.backward()
        o.step()
    for block in optimizer.curvature().blocks.values():
        assert all(tensor.dtype == torch.float32 for tensor in block.tensors().values())
    assert optimizer.state[model[0].weight]["momentum_buffer"].dtype == torch.float32
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.1, atol=0.01)


def test_a_model_in_bfloat16_is_trained() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(6, 3)).bfloat16()
    optimizer = unclipped(model, kf.Categorical(), lr=0.5, damping=0.1, average=0.9, kl_clip=0.01)
    x, y = torch.randn(16, 1, 3, dtype=torch.bfloat16), torch.arange(16) % 3
    before = copy.deepcopy(model)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert p.dtype == torch.bfloat16
        assert not torch.equal(p, q)
        assert p.isfinite().all()


STEPS = {
    "kfac": lambda m: kf.optim.KFAC(m, kf.Categorical(), lr=0.1),
    "rows": lambda m: kf.optim.KFAC(m, kf.Categorical(), lr=0.1, gradients="rows", kl_clip=None),
    "ekfac": lambda m: kf.optim.EKFAC(m, kf.Categorical(), lr=0.1),
    "tkfac": lambda m: kf.optim.TKFAC(m, kf.Categorical(), lr=0.1),
    "so": lambda m: kf.optim.KLDWRM(m, kf.Categorical(), 10.0, variant="so"),
    "q": lambda m: kf.optim.KLDWRM(m, kf.Categorical(), 10.0, variant="q"),
    "qe": lambda m: kf.optim.KLDWRM(m, kf.Categorical(), 10.0, variant="qe"),
    "adaptive": lambda m: kf.optim.AdaptiveKFAC(m, kf.Categorical()),
    "hessian free": lambda m: kf.optim.HessianFree(m, kf.Categorical()),
}


@pytest.mark.parametrize("name", STEPS)
def test_autocast_around_the_step_changes_nothing(name: str) -> None:
    """A loop that leaves it on around backward and step; the forward has its own."""
    x, y = draw(24, 1, 8, 8).float(), torch.arange(24) % 3
    found = []
    for around in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 64), nn.Tanh(), nn.Linear(64, 3)
        )
        optimizer = STEPS[name](model)

        def closure() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=False):
                return F.cross_entropy(model(x), y)  # noqa: B023

        for _ in range(3):
            optimizer.zero_grad()
            if name in ("qe", "adaptive", "hessian free"):
                with torch.autocast("cpu", torch.bfloat16, enabled=around):
                    optimizer.step(closure)
            else:
                closure().backward()
                with torch.autocast("cpu", torch.bfloat16, enabled=around):
                    optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))
