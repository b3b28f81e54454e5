"""The error of a part of a batch is what its estimate shows beside that of the whole."""

from __future__ import annotations

import math

import pytest
import torch
from tests.exactness_helpers import double, draw, relative
from tests.optim.hand_kfac import network
from torch import nn

import kronfac as kf


def table(rows: list[dict[str, object]]) -> dict[tuple[object, ...], object]:
    return {(row["examples"], row["layer"], row["factor"]): row["error"] for row in rows}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_errors_are_those_of_two_estimates(reduction: str) -> None:
    model, likelihood, x = network(), kf.Categorical(reduction=reduction), draw(12, 3)
    found = table(kf.analysis.sub_batch_error(model, likelihood, (x, None), examples=[3, 8, 12], source="exact"))
    whole = kf.estimate(model, likelihood, (x, None), source="exact").blocks
    for m in (3, 8):
        part = kf.estimate(model, likelihood, (x[:m], None), source="exact").blocks
        for factor, scale in (("input", 1.0), ("output", 12 / m if reduction == "sum" else 1.0)):
            errors = []
            for name, block in whole.items():
                errors.append(relative(part[name].tensors()[factor] * scale, block.tensors()[factor]))
                assert found[m, name, factor] == pytest.approx(errors[-1], abs=1e-12)
            assert found[m, "*", factor] == pytest.approx(sum(errors) / 3, abs=1e-12)
    assert all(error == 0.0 for (m, *_), error in found.items() if m == 12)


def test_it_falls_as_the_square_root_and_leaves_the_model() -> None:
    """In the mean over layers and seeds, as √(1/m − 1/N); under batch norm in train mode, too."""
    model = double(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4)))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    total = dict.fromkeys((32, 128), 0.0)
    for seed in range(8):
        batch = (draw(512, 6, seed=seed), None)
        rows = kf.analysis.sub_batch_error(model, kf.Categorical(), batch, examples=list(total), seed=seed)
        found = table(rows)
        assert found[32, "1", "matrix"] == 0.0  # batch norm's own block
        for m in total:
            total[m] += found[m, "*", "input"] + found[m, "*", "output"]  # type: ignore[operator]
    wanted = math.sqrt((1 / 32 - 1 / 512) / (1 / 128 - 1 / 512))
    assert total[32] / total[128] == pytest.approx(wanted, rel=0.15)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_compared_is_refused() -> None:
    batch = (draw(8, 3), None)
    for sizes in (0, 9, [2, True], [2.0]):
        with pytest.raises(ValueError, match="is no integer from 1 to the 8 examples given"):
            kf.analysis.sub_batch_error(network(), kf.Categorical(), batch, examples=sizes)  # type: ignore[arg-type]
    for approximation in ("xkfac", "ekfac", "kfac_tridiagonal"):
        with pytest.raises(ValueError, match=f"approximation='{approximation}' has no entries to compare"):
            kf.analysis.sub_batch_error(
                network(), kf.Categorical(), batch, examples=2, approximation=approximation, source="sampled"
            )


def test_factors_that_are_zero_have_no_error() -> None:
    """A layer of units that are never on: 0/0 would make its own error, and the mean over layers, NaN."""
    model = double(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    with torch.no_grad():
        model[0].bias.fill_(-1e3)  # type: ignore[union-attr]
    found = table(kf.analysis.sub_batch_error(model, kf.Categorical(), (draw(8, 3), None), examples=4))
    assert found[4, "0", "output"] == 0.0
    assert found[4, "*", "output"] == pytest.approx(found[4, "2", "output"] / 2)  # type: ignore[operator]
    assert found[4, "0", "input"] > 0.0  # type: ignore[operator]
