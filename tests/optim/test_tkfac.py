"""`TKFAC`: its step by hand, its two dampings, resuming, and what it refuses."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.damping import TraceRestricted, expansion, normal

LABELS = torch.arange(12) % 3
SCHEMES = ["normal", "trace_restricted"]


def network() -> nn.Module:
    return double(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Flatten(),
            nn.Linear(16, 3),
        )
    )  # fmt: skip


def make(model: nn.Module, lr: float = 0.1, **options: Any) -> kf.optim.TKFAC:
    options = {"damping": 0.1, "stats_every": 2, "invert_every": 3, "burn_in": 2, "kl_clip": None, **options}
    return kf.optim.TKFAC(model, kf.Categorical(), lr, **options)


def images(step: int) -> Tensor:
    return draw(12, 1, 4, 4, seed=step)


def train(model: nn.Module, optimizer: kf.optim.TKFAC, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images(step % 2)), LABELS)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_first_step_by_hand(scheme: str) -> None:
    """``θ - α (damped block)⁻¹ ∇``, with (5.17) over all layers and convolutions not expanded."""
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make(model, scheme=scheme, nu=5.0, source="exact", damping=0.2)
    for parameter in model.parameters():
        parameter.grad = None
    F.cross_entropy(model(images(0)), LABELS).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    curvature = optimizer.curvature()
    deltas = [b.tensors()["delta"] for name, b in curvature.blocks.items() if name != "3"]
    beta = expansion(deltas, 5.0)
    assert beta > 1.5, "the test would not see the expansion"
    for name, block in curvature.blocks.items():
        layout = curvature.layouts[name]
        rule = normal if scheme == "normal" else TraceRestricted(5.0, beta if name == "5" else 1.0)
        own = {key: gradients[key] for key in layout.parameter_names}
        moved = layout.unpack(block.factorise(rule(block, 0.2)).apply(layout.pack(own)))
        for key, value in moved.items():
            found = dict(model.named_parameters())[key].detach()
            torch.testing.assert_close(found, before[key] - 0.1 * value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_loss_falls(scheme: str) -> None:
    model = network()
    losses = train(model, make(model, scheme=scheme, damping=0.01, kl_clip="auto"), range(60))
    assert sum(losses[-2:]) < 0.5 * sum(losses[:2])


@pytest.mark.parametrize("options", [{"scheme": s, "average": a} for s in SCHEMES for a in (None, 0.5)])
def test_a_resumed_run_is_the_run_that_never_stopped(options: dict[str, Any]) -> None:
    model = network()
    optimizer = make(model, **options)
    train(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(network())
    other.load_state_dict(model.state_dict())
    resumed = make(other, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert train(model, optimizer, range(5, 12)) == train(other, resumed, range(5, 12))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_restricted_steps_do_not_depend_on_the_damping_without_norms() -> None:
    moved = []
    for damping in (1e-3, 10.0):
        model = double(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))
        train(model, make(model, scheme="trace_restricted", damping=damping), range(3))
        moved.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*moved)


def test_embeddings_are_trained_under_both_schemes() -> None:
    x = torch.arange(12).reshape(12, 1) % 5
    for scheme in SCHEMES:
        model = double(nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(4, 3)))
        optimizer, losses = make(model, scheme=scheme), []
        for _ in range(30):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), x[:, 0] % 3)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"approximation": "kfac"}, TypeError, "TKFAC fixes approximation;"),
        ({"damping_rule": "exact", "approximation": "kfac"}, TypeError, "fixes approximation and damping_rule"),
        ({"scheme": "new"}, ValueError, r"scheme='new' is unknown; choose one of \('normal', 'trace_restricted'\)"),
        ({"nu": 0.0}, ValueError, "nu=0.0 must be a number > 0"),
        ({"nu": "much"}, ValueError, "nu='much' must be a number > 0"),
        ({"source": "forward_only"}, ValueError, "needs paired statistics"),
        ({"typo": 1}, TypeError, "unknown options"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kf.optim.TKFAC(network(), kf.Categorical(), 0.1, **options)


def test_an_expansion_beyond_all_measure_lets_layers_stand_still() -> None:
    class Faint(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.conv, self.last, self.scale = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(49, 3), scale

        def forward(self, x: Tensor) -> Tensor:
            return self.last((x + self.scale * self.conv(x).sum(1, keepdim=True)).flatten(1) * 30)

    for scale in (1e-19, 1e-20, 1e-23, 0.0):
        model = Faint(scale)
        optimizer = kf.optim.TKFAC(model, kf.Categorical(), 0.01, scheme="trace_restricted", kl_clip=None)
        F.cross_entropy(model(draw(8, 1, 7, 7).float()), torch.arange(8) % 3).backward()
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())
