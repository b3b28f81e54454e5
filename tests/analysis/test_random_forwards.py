"""Dropout in train mode: refused where several networks would be compared, seeded where one is looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw
from torch import nn

import kronfac as kf
from kronfac import analysis

X, Y = draw(12, 1, 4, 4), torch.arange(12) % 3


def network() -> nn.Module:
    return double(nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(18, 3)))


COMPARISONS: dict[str, Callable[[nn.Module], Any]] = {
    "error": lambda m: analysis.approximation_error(m, kf.Categorical(), (X, Y), approximations=["dense"]),
    "matrices": lambda m: analysis.matrices(m, kf.Categorical(), (X, Y), "0", approximations="dense"),
    "spectrum": lambda m: analysis.spectrum(m, kf.Categorical(), (X, Y)),
    "rank": lambda m: analysis.monte_carlo_rank(m, kf.Categorical(), X, Y, batch_sizes=[2]),
}
LOOKS: dict[str, Callable[[nn.Module, int], Any]] = {
    "sub-batch": lambda m, seed: analysis.sub_batch_error(m, kf.Categorical(), (X, Y), examples=6, seed=seed),
    "autocorrelation": lambda m, seed: analysis.autocorrelation(m, kf.Categorical(), [(X, Y)] * 2, seed=seed),
    "locations": lambda m, seed: [
        found.by_distance() for found in analysis.location_correlation(m, kf.Categorical(), (X, Y), ["0"], seed=seed)
    ],
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_refuse_it(name: str) -> None:
    """The exact curvature was that of other masks: the dense block from the exact source had an error of 80 %."""
    model, state = network().train(), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"Two forward passes .* dropout in train mode\? Call model.eval\(\)"):
        COMPARISONS[name](model)
    assert torch.equal(torch.get_rng_state(), state)
    COMPARISONS[name](model.eval())


@pytest.mark.parametrize("name", LOOKS)
def test_masks_are_the_seed_s_and_torch_s_own_state_is_left_alone(name: str) -> None:
    model, found = network().train(), []
    for start, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(start)
        state = torch.get_rng_state()
        found.append(LOOKS[name](model, seed))
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1]
    assert found[0] != found[2]
