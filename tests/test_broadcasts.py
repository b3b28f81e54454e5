"""Layers without a dimension of examples, whose outputs are added to what has one: embeddings of positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.exactness_helpers import double, draw
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf

TOKENS = torch.arange(12).reshape(3, 4) % 5
LABELS = torch.arange(12).reshape(3, 4) % 3

Join = Callable[[Tensor, Tensor], Tensor]


class Positions(nn.Module):
    """Tokens and positions; ``join`` puts their embeddings together."""

    def __init__(self, join: Join = torch.add, layer: Callable[[], nn.Module] = lambda: nn.Embedding(6, 3)) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(5, 3), layer()
        self.norm, self.head, self.join = nn.LayerNorm(3), nn.Linear(3, 3), join

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1])
        if not isinstance(self.positions, nn.Embedding):
            places = torch.stack([places.double().sin(), places.double().cos()], 1)
        out: Tensor = self.head(torch.tanh(self.norm(self.join(self.tokens(tokens), self.positions(places)))))
        return out


JOINS: dict[str, Join] = {
    "sum": lambda x, p: x + p,
    "one example": lambda x, p: x + p.unsqueeze(0),
    "in place": lambda x, p: x.mul(1.0).add_(p),
    "expanded": lambda x, p: torch.stack([x, p.expand_as(x)]).sum(0),
    "repeated": lambda x, p: x + 2 * p.repeat(len(x), 1, 1),
    "cast": lambda x, p: x + p.float().double()[None],
}
LIKELIHOOD = kf.Categorical(class_dim=-1)


def blocks_of(matrix: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """The diagonal blocks of single parameters."""
    out, start = {}, 0
    for name, p in model.named_parameters():
        out[name] = matrix[start : start + p.numel(), start : start + p.numel()]
        start += p.numel()
    return out


@pytest.mark.parametrize("name", JOINS)
def test_examples_are_told_apart_where_they_meet_the_positions(name: str) -> None:
    model = double(Positions(JOINS[name]))
    exact = blocks_of(kf.reference.ggn(model, LIKELIHOOD, TOKENS, LABELS), model)
    found = kf.estimate(model, LIKELIHOOD, (TOKENS, LABELS), approximation="dense", source="exact").to_dense()
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if name == "cast" else {"rtol": 1e-9, "atol": 1e-12}
    for key, block in blocks_of(found, model).items():
        if key != "norm.weight" and key != "norm.bias":  # kept unit by unit
            torch.testing.assert_close(block, exact[key], **tolerance)


def test_a_linear_layer_of_positions() -> None:
    model = double(Positions(layer=lambda: nn.Linear(2, 3)))
    exact = blocks_of(kf.reference.ggn(model, LIKELIHOOD, TOKENS, LABELS), model)
    found = kf.estimate(model, LIKELIHOOD, (TOKENS, LABELS), approximation="dense", source="exact").to_dense()
    torch.testing.assert_close(
        blocks_of(found, model)["positions.weight"], exact["positions.weight"], rtol=1e-9, atol=1e-12
    )


def test_targets_that_are_left_out_count_at_no_position() -> None:
    """The factors of the same model that is given each example's positions."""

    class Given(Positions):
        def forward(self, tokens: Tensor) -> Tensor:
            places = torch.arange(tokens.shape[1]).expand_as(tokens)
            out: Tensor = self.head(torch.tanh(self.norm(self.tokens(tokens) + self.positions(places))))
            return out

    model, given = double(Positions()), double(Given())
    given.load_state_dict(model.state_dict())
    likelihood, labels = kf.Categorical(class_dim=-1, ignore_index=-100), LABELS.clone()
    labels[0, 2:] = -100
    found, wanted = (kf.estimate(m, likelihood, (TOKENS, labels), source="exact") for m in (model, given))
    for name, block in wanted.blocks.items():
        torch.testing.assert_close(found.blocks[name].to_dense(), block.to_dense(), rtol=1e-12, atol=1e-14)
    kf.verify(model, likelihood, (TOKENS, labels)).raise_if(scale=1e-9)


def test_training_gathers_what_is_estimated() -> None:
    model = double(Positions())
    wanted = kf.estimate(model, LIKELIHOOD, (TOKENS, LABELS), source="exact").blocks["positions"]
    optimizer = kf.optim.KFAC(model, LIKELIHOOD, lr=0.1, kl_clip=None, source="exact")
    F.cross_entropy(model(TOKENS).flatten(0, 1), LABELS.flatten()).backward()
    found = optimizer._estimator.curvature().blocks["positions"]
    torch.testing.assert_close(found.to_dense(), wanted.to_dense(), rtol=1e-12, atol=1e-14)
    optimizer.step()


@pytest.mark.parametrize("other", ["scaled", "used twice", "subtracted"])
def test_what_is_used_in_another_way_first_is_refused(other: str) -> None:
    joins: dict[str, Join] = {
        "scaled": lambda x, p: x + 2 * p,
        "used twice": lambda x, p: (x + p) * p,
        "subtracted": lambda x, p: x - p,
    }
    model = double(Positions(joins[other]))
    with pytest.raises(ValueError, match=r"needs the examples one by one.*'positions'.*is 4, not the batch of 3"):
        kf.estimate(model, LIKELIHOOD, (TOKENS, LABELS), source="exact")


def test_conditions_of_examples_in_a_sequence_with_time_first_are_not_positions() -> None:
    """As many time steps as examples: what is added is one for each example, not for each step."""

    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.condition, self.head = nn.Linear(2, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor, condition: Tensor) -> Tensor:
            out: Tensor = self.head(torch.tanh(x.transpose(0, 1) + self.condition(condition)))
            return out.transpose(0, 1)

    model, x = double(TimeFirst()), (draw(3, 3, 3), draw(3, 2, seed=1))
    adapters = kf.layers.adapt_model(model).adapters
    with kf.tape.record(adapters) as tape:
        out = model(*x)
    tape.meet(out)
    assert tape.calls["condition"].input.shape == (3, 2)
