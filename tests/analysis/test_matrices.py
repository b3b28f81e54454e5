from __future__ import annotations

import pytest
import torch
from tests.analysis.test_error import classifier, data_for
from tests.exactness_helpers import double
from torch import nn

import kronfac as kf
from kronfac.analysis import matrices


def test_matrices_are_the_oracle_s_and_the_approximation_s() -> None:
    model, (x, y) = classifier(), data_for((5,))
    exact, kfac, dense = matrices(model, kf.Categorical(), (x, y), "0", approximations=["kfac", "dense"])
    # nn.Linear's weight [4, 5] comes first among the parameters, then its bias: rows of V are [w_i, b_i].
    place = torch.cat([torch.cat([torch.arange(5 * i, 5 * i + 5), torch.tensor([20 + i])]) for i in range(4)])
    wanted = kf.reference.ggn(model, kf.Categorical(), x, y)[place][:, place]
    torch.testing.assert_close(exact["matrix"], wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dense["matrix"], wanted, rtol=1e-9, atol=1e-12)
    assert dense["error"] < 1e-12
    found = kf.estimate(model, kf.Categorical(), (x, y), source="exact").blocks["0"].to_dense()
    torch.testing.assert_close(kfac["matrix"], found)
    torch.testing.assert_close(kfac["difference"], (found - wanted).abs(), rtol=1e-8, atol=1e-12)
    assert kfac["error"] == pytest.approx(float((found - wanted).norm() / wanted.norm()))


def test_columns_first_and_weights_alone_give_the_papers_kronecker_product() -> None:
    model, data = classifier(), data_for((5,))
    _, row = matrices(model, kf.Categorical(), data, "0", approximations="kfac", weights_only=True, order="columns")
    block = kf.estimate(model, kf.Categorical(), data, source="exact").blocks["0"]
    wanted = torch.kron(block.input[:5, :5], block.output)  # type: ignore[attr-defined]
    torch.testing.assert_close(row["matrix"], wanted)


def test_refusals() -> None:
    model, data = classifier(), data_for((5,))
    with pytest.raises(ValueError, match=r"24 x 24 each, need .* memory_limit"):
        matrices(model, kf.Categorical(), data, "0", memory_limit=1000)
    with pytest.raises(ValueError, match="no layer 'x'"):
        matrices(model, kf.Categorical(), data, "x")
    with pytest.raises(ValueError, match="order='diagonals'"):
        matrices(model, kf.Categorical(), data, "0", order="diagonals")


def test_blocks_that_are_zero_have_no_error() -> None:
    """Units that are never on: 0/0 was NaN."""
    model, data = double(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))), data_for((5,))
    with torch.no_grad():
        model[0].bias.fill_(-1e3)  # type: ignore[union-attr]
    rows = matrices(model, kf.Categorical(), data, "0", approximations=["kfac", "diagonal"])
    assert not rows[0]["matrix"].any()
    assert [row["error"] for row in rows] == [None, 0.0, 0.0]
