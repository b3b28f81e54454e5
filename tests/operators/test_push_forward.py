"""Derivatives in a direction where torch has no forward rule, or none for the strides at hand."""

from __future__ import annotations

import pytest
import torch
from tests.exactness_helpers import double, draw
from torch import nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.operators.gauss_newton import ggn_gram
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


@pytest.mark.parametrize("padding", [1, -1])
def test_padding_rows_have_no_tangent(padding: int) -> None:
    """As they have no gradient: what passes forward and back is one symmetric matrix."""
    model = double(nn.Sequential(nn.Embedding(4, 3, padding_idx=padding), nn.Flatten(), nn.Linear(6, 3)))
    x = torch.arange(24).reshape(12, 2) % 4
    operator = kf.GaussNewtonOperator(model, kf.Categorical(), (x, None))
    wanted = kf.reference.ggn(model, kf.Categorical(), x)
    torch.testing.assert_close(operator.to_dense(), wanted, rtol=1e-10, atol=1e-12)
    vectors = [{n: draw(*p.shape, seed=seed) for n, p in model.named_parameters()} for seed in range(2)]
    flat = torch.stack([torch.cat([t.flatten() for t in vector.values()]) for vector in vectors])
    gram = ggn_gram(model, kf.Categorical(), x, vectors)
    torch.testing.assert_close(gram, flat @ wanted @ flat.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(operator.quadratic_form(vectors[0]), gram[0, 0], rtol=1e-10, atol=1e-12)


def test_a_tied_padding_row_has_the_tangent_of_its_other_use() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 3, padding_idx=0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.table(x)).mean(1) @ self.table.weight.T

    model, x = double(Tied()), torch.arange(24).reshape(12, 2) % 4
    found = kf.GaussNewtonOperator(model, kf.Categorical(), (x, None)).to_dense()
    wanted = kf.reference.ggn(model, kf.Categorical(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_what_has_neither_derivative_says_what_does_without() -> None:
    model = nn.Sequential(nn.EmbeddingBag(10, 8), nn.Linear(8, 3))
    x = torch.arange(48).reshape(12, 4) % 10
    with pytest.warns(kf.CoverageWarning):
        optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1)
    F.cross_entropy(model(x), LABELS).backward()
    with pytest.raises(NotImplementedError, match=r"needs a forward or a second derivative.*kl_clip=None"):
        optimizer.step()
