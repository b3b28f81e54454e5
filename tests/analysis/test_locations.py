"""Correlations of products between locations, against their definitions and on products that are known."""

from __future__ import annotations

import math

import pytest
import torch
from tests.exactness_helpers import double, draw
from torch import nn

import kronfac as kf
from kronfac.analysis import location_correlation
from kronfac.layers import adapt_model
from kronfac.sources import Sampled
from kronfac.tape import record


def model(groups: int = 1) -> nn.Module:
    return double(
        nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, groups=groups), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))
    ).eval()


def test_both_kinds_by_definition() -> None:
    net, batches = model(), [(draw(7, 2, 5, 7), None), (draw(4, 2, 5, 7, seed=1), None)]
    (found,) = location_correlation(net, kf.Categorical(), batches, ["0"], entries=10, seed=2)
    adapters, generator, products = adapt_model(net).adapters, torch.Generator().manual_seed(2), []
    for x, _ in batches:
        with record({"0": adapters["0"]}) as tape:
            outputs = net(x)
        ((sample,),) = Sampled().samples(tape, kf.Categorical(), outputs, None, generator)
        a, u = adapters["0"].expand(x), adapters["0"].expand_cotangents(sample.cotangents)
        products.append(torch.einsum("nto,nti->ntoi", u, a))
    whole = torch.cat(products)
    assert (found.size, found.layer) == ((2, 3), "0")
    gram = torch.einsum("ntoi,nsoi->ts", whole, whole)
    norm = gram.diagonal().sqrt()
    torch.testing.assert_close(found.trace, gram / (norm[:, None] * norm[None, :]), rtol=1e-9, atol=1e-9)
    # The entries are drawn by a generator of their own: columns, then rows.
    picker = torch.Generator().manual_seed(2)
    columns, rows = torch.randint(19, (10,), generator=picker), torch.randint(4, (10,), generator=picker)
    correlations = []
    for i, j in zip(rows, columns, strict=True):
        values = whole[:, :, i, j]
        values = values / values.norm(dim=0)
        correlations.append((values.T @ values).abs())
    torch.testing.assert_close(found.entries, torch.stack(correlations).mean(0), rtol=1e-9, atol=1e-9)


def test_independent_products_show_sampling_alone() -> None:
    """White inputs, and derivatives that are the independent noise of the drawn labels."""
    net = double(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten())).eval()
    n = 400
    (found,) = location_correlation(net, kf.Gaussian(), (draw(n, 1, 4, 4, seed=7), None), ["0"], seed=1)
    off = ~torch.eye(16, dtype=torch.bool)
    torch.testing.assert_close(found.trace.diagonal(), torch.ones(16).double())
    expected = math.sqrt(2 / (math.pi * n))  # mean absolute value of a correlation of n independent normal numbers
    assert float(found.entries[off].mean()) == pytest.approx(expected, rel=0.5)
    assert found.entries_floor == pytest.approx(expected, rel=0.5)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_floor_does_not_depend_on_the_batches(size: int) -> None:
    net, x = model(), draw(21, 2, 5, 7)
    whole, parts = (
        location_correlation(net, kf.Categorical(), data, ["0"])[0]
        for data in ((x, None), [(part, None) for part in x.split(size)])
    )
    # The labels are drawn batch by batch, in one order.
    assert parts.trace_floor == pytest.approx(whole.trace_floor, rel=1e-10)
    (alone,) = location_correlation(net, kf.Categorical(), (x[:1], None), ["0"])
    assert alone.trace_floor == 0  # there are no others


def test_a_common_factor_shows() -> None:
    """All locations see the same pixel and sum into one output: the products are the same."""
    net = double(nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.AvgPool2d(3), nn.Flatten())).eval()
    x = draw(50, 1, 1, 1).expand(50, 1, 3, 3).contiguous()
    (found,) = location_correlation(net, kf.Gaussian(), (x, torch.zeros(50, 1).double()), ["0"])
    torch.testing.assert_close(found.trace, torch.ones(9, 9).double())
    torch.testing.assert_close(found.entries, torch.ones(9, 9).double())
    assert found.trace_floor < 0.5
    assert [row[0] for row in found.by_distance()] == [0, 1, 2]
    assert all(row[1:] == (pytest.approx(1.0), pytest.approx(1.0)) for row in found.by_distance())


def test_entries_that_are_zero_are_left_out() -> None:
    net = double(nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten())).eval()
    x = draw(20, 1, 2, 2)
    x[:, :, 0, 0] = 0.0
    (found,) = location_correlation(net, kf.Gaussian(), (x, None), ["0"])
    assert found.entries[0].isnan().all()
    assert not found.entries[1:, 1:].isnan().any()
    assert not any(math.isnan(value) for row in found.by_distance() for value in row)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"layer '3' is no convolution without groups; those there are: 0"):
        location_correlation(model(), kf.Categorical(), (draw(2, 2, 5, 7), None), ["3"])
    with pytest.raises(ValueError, match=r"layer '0' is no convolution without groups"):
        location_correlation(model(groups=2), kf.Categorical(), (draw(2, 2, 5, 7), None), ["0"])
    with pytest.raises(ValueError, match="no layer was named"):
        location_correlation(model(), kf.Categorical(), (draw(2, 2, 5, 7), None), [])
    with pytest.raises(ValueError, match="loader is empty"):
        location_correlation(model(), kf.Categorical(), [], ["0"])
