"""The plugin on a stand-in of Avalanche 0.6's interface."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests.continual.avalanche_standin import Data, Naive
from torch import Tensor, nn

import kronfac as kf
from kronfac.continual import AvalanchePlugin, PenaltySum, QuadraticPenalty


def experiences() -> list[SimpleNamespace]:
    torch.manual_seed(0)
    found = []
    for task in range(2):
        x = torch.randn(61, 6)  # the last batch has one example
        y = (x[:, task] > 0).long()
        found.append(SimpleNamespace(dataset=Data((x[i], int(y[i]), task) for i in range(61))))
    return found


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 2))


def loss_on(model: nn.Module, experience: SimpleNamespace) -> float:
    x = torch.stack([item[0] for item in experience.dataset])
    y = torch.tensor([item[1] for item in experience.dataset])
    return float(nn.functional.cross_entropy(model(x), y).detach())


@pytest.mark.parametrize("approximation", ["kfac", "diagonal", "xkfac"])
def test_earlier_experiences_are_remembered(approximation: str) -> None:
    first, second = experiences()
    losses = []
    for strength in (0.0, 30.0):
        plugin = AvalanchePlugin(kf.Categorical(), approximation=approximation, strength=strength)
        strategy = Naive(network(), [plugin])
        strategy.train(first)
        assert isinstance(plugin.penalty, QuadraticPenalty)
        strategy.train(second)
        assert plugin.penalty.tasks == 2
        losses.append(loss_on(strategy.model, first))
    assert losses[1] < 0.7 * losses[0]


def test_the_penalty_is_added_to_the_loss_and_nothing_else_is_touched() -> None:
    first, _ = experiences()
    plugin = AvalanchePlugin(kf.Categorical(), strength=3.0, online=False)
    strategy = Naive(network(), [plugin])
    plugin.before_backward(strategy)
    assert float(strategy.loss) == 0.0
    strategy.train(first, steps=2)
    with torch.no_grad():
        for parameter in strategy.model.parameters():
            parameter.add_(0.1)
    strategy.loss = torch.tensor(2.0)
    plugin.before_backward(strategy)
    assert isinstance(plugin.penalty, QuadraticPenalty)
    expected: Tensor = 2.0 + plugin.penalty(strategy.model)
    torch.testing.assert_close(strategy.loss, expected)
    assert float(expected.detach()) > 2.0
    strategy.train(first, steps=1)
    assert isinstance(plugin.penalty, PenaltySum)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"likelihood": nn.CrossEntropyLoss()},
            TypeError,
            "likelihood must be a kronfac likelihood, got CrossEntropyLoss",
        ),
        ({"combine": "all"}, ValueError, "combine='all' is unknown"),
        ({"examples": 0}, ValueError, "examples must be at least 1"),
        ({"strength": -1.0}, ValueError, "strength must be finite"),
    ],
)
def test_bad_input(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AvalanchePlugin(**{"likelihood": kf.Categorical(), **arguments})
