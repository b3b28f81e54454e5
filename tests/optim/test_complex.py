"""Complex parameters, as of Fourier layers, are pairs of real numbers to whatever measures a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.exactness_helpers import draw
from torch import Tensor, nn

import kronfac as kf

X, Y = draw(10, 4), draw(10, 4, seed=1)


class Spectral(nn.Module):
    """A linear layer, and a filter in frequencies whose weight is complex, or pairs of real numbers."""

    def __init__(self, pairs: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4).double()
        self.pairs, start = pairs, draw(3, 2, seed=2)
        with torch.no_grad():
            self.linear.weight.copy_(draw(4, 4, seed=3))
            self.linear.bias.copy_(draw(4, seed=4))
        self.filter = nn.Parameter(start if pairs else torch.view_as_complex(start))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.view_as_complex(self.filter) if self.pairs else self.filter
        return torch.fft.irfft(torch.fft.rfft(self.linear(x)) * weight, n=4)


def trained(kind: Any, pairs: bool, **options: Any) -> Tensor:
    model, loss = Spectral(pairs), kf.Gaussian().loss
    with pytest.warns(kf.CoverageWarning, match="filter"):
        optimizer = kind(model, kf.Gaussian(), **options)
    for _ in range(4):
        if kind in (kf.optim.KFAC, kf.optim.KLDWRM):
            optimizer.zero_grad()
            loss(model(X), Y).backward()
            optimizer.step()
        else:
            optimizer.step(lambda: loss(model(X), Y))
    found = model.filter.detach()
    return found if pairs else torch.view_as_real(found)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (kf.optim.AdaptiveKFAC, {}),
        (kf.optim.AdaptiveKFAC, {"weight_decay": 0.1}),
        (kf.optim.KFAC, {"lr": 0.1, "kl_clip": 1e-3, "weight_decay": 0.1, "stats_every": 1}),
        (kf.optim.KLDWRM, {"lam": 1.0, "variant": "so"}),
    ],
)
def test_steps_are_those_of_pairs_of_real_numbers(kind: Any, options: dict[str, Any]) -> None:
    torch.testing.assert_close(trained(kind, False, **options), trained(kind, True, **options), rtol=1e-9, atol=1e-12)


def test_what_multiplies_with_vectors_refuses_them_by_name() -> None:
    model = Spectral(False)
    for operator in (kf.GaussNewtonOperator, kf.HessianOperator):
        with pytest.raises(TypeError, match=r"\['filter'\] are complex numbers.*view_as_real"):
            operator(model, kf.Gaussian(), (X, Y))
    alone = kf.GaussNewtonOperator(model, kf.Gaussian(), (X, Y), parameters=["linear.weight"])
    assert alone.to_dense().shape == (16, 16)
    refused = pytest.raises(TypeError, match=r"\['filter'\] are complex numbers")
    with refused, pytest.warns(kf.CoverageWarning, match="filter"):
        kf.optim.HessianFree(model, kf.Gaussian(), damping=1.0, precondition=False)
    assert trained(kf.optim.HessianFree, True, damping=1.0).isfinite().all()
