"""Derivatives in a direction where torch has no forward rule, or none for the strides at hand."""

from __future__ import annotations

import pytest
import torch
from tests.exactness_helpers import double, draw
from torch import nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.operators.passes import push_forward

LABELS = torch.arange(12) % 3


def test_group_norm_with_channels_last() -> None:
    """Whose forward rule takes a view of what is not contiguous."""
    model = double(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    )
    x = draw(12, 3, 8, 8)
    vector = {name: draw(*p.shape, seed=i) for i, (name, p) in enumerate(model.named_parameters())}
    wanted = push_forward(model, x, vector, None)
    model.to(memory_format=torch.channels_last)
    found = push_forward(model, x.to(memory_format=torch.channels_last), vector, None)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_what_has_neither_derivative_says_what_does_without() -> None:
    model = nn.Sequential(nn.EmbeddingBag(10, 8), nn.Linear(8, 3))
    x = torch.arange(48).reshape(12, 4) % 10
    with pytest.warns(kf.CoverageWarning):
        optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1)
    F.cross_entropy(model(x), LABELS).backward()
    with pytest.raises(NotImplementedError, match=r"needs a forward or a second derivative.*kl_clip=None"):
        optimizer.step()
