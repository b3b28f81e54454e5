"""Rows that are as many as the examples by chance are told from examples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double
from torch import Tensor, nn

import kronfac as kf


class Positions(nn.Module):
    """As many position indices as examples."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions, self.last = nn.Embedding(7, 5), nn.Embedding(9, 5), nn.Linear(5, 3)
        double(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.words(x) + self.positions(torch.arange(x.shape[1]))).mean(1))


class TimeFirst(nn.Module):
    """Sequences with time first, as long as the batch; of the last step, or of all."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.words, self.recurrent, self.out, self.last = nn.Embedding(7, 5), nn.GRU(5, 5), nn.Linear(5, 3), last
        double(self)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.recurrent(self.words(x))[0]
        return self.out(hidden[-1] if self.last else hidden)


class Mixing(nn.Module):
    """Each output knows of all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(7, 5), nn.Linear(5, 3)
        double(self)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.words(x).mean(1)
        return self.out(hidden - hidden.mean(0))


@pytest.mark.filterwarnings("ignore:No curvature for", "ignore:Trained without curvature")
@pytest.mark.parametrize(
    "options",
    [{"source": "exact"}, {"approximation": "ekfac"}, {"approximation": "dense"}, {"approximation": "diagonal"}],
)
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (Positions, "layer 'positions''s input is 4, not the batch of 3"),
        (lambda: TimeFirst(last=True), "layer 'out''s input is 4, not the batch of 3"),
        (lambda: TimeFirst(last=False), "the outputs of the others are not what they were"),
        (Mixing, "the outputs of the others are not what they were"),
    ],
)
def test_rows_that_are_as_many_as_the_examples_by_chance(
    make: Callable[[], nn.Module], text: str, options: dict[str, Any]
) -> None:
    model, x = make(), torch.arange(16).reshape(4, 4) % 7
    state, mode = copy.deepcopy(model.state_dict()), model.training
    labels = torch.arange(16).reshape(4, 4) % 3 if model(x).ndim == 3 else torch.arange(4) % 3
    likelihood = kf.Categorical(class_dim=-1)
    with pytest.raises(ValueError, match=text):
        kf.estimate(model, likelihood, (x, labels), **options)
    assert model.training == mode
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    kf.estimate(model, likelihood, (x, labels))  # K-FAC needs no examples
    optimizer = kf.optim.EKFAC(model, likelihood, lr=0.1)
    with pytest.raises(ValueError, match=text):
        model(x)
    del optimizer
