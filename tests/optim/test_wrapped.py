"""Optimisers in a wrapper whose class inherits from theirs and hands attributes on, as Lightning's and Fabric's do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.optim.hand_kfac import network
from tests.optim.loops import batch, close, train
from torch import nn
from torch.nn import functional as F

import kronfac as kf

MAKERS: dict[str, Callable[[nn.Module], kf.optim.KFAC]] = {
    "KFAC": lambda model: kf.optim.KFAC(model, kf.Categorical(), lr=0.1),
    "EKFAC": lambda model: kf.optim.EKFAC(model, kf.Categorical(), lr=0.1),
    "KLDWRM": lambda model: kf.optim.KLDWRM(model, kf.Categorical(), 20.0, variant="q", stats_every=3),
    "AdaptiveKFAC": lambda model: kf.optim.AdaptiveKFAC(model, kf.Categorical(), source="exact"),
}


class Wrapper:
    """Lends its step to whoever wraps it, and looks like what it wraps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._wrapped = optimizer
        self.__class__ = type("Wrapped" + type(optimizer).__name__, (type(self), type(optimizer)), {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self._wrapped.step() if closure is None else self._wrapped.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


def advance(kind: str, model: nn.Module, optimizer: Any, steps: int, first: int = 0) -> None:
    if kind != "AdaptiveKFAC":
        train(model, optimizer, steps, first=first)
        return
    for step in range(first, first + steps):
        x, y = batch(step)
        optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))


@pytest.mark.parametrize("kind", list(MAKERS))
def test_a_state_is_saved_and_loaded_through_a_wrapper(kind: str) -> None:
    model, twin = network(), network()
    first, second = MAKERS[kind](model), MAKERS[kind](twin)
    wrapped: Any = Wrapper(first)
    assert isinstance(wrapped, kf.optim.KFAC)
    advance(kind, model, wrapped, 4)
    twin.load_state_dict(model.state_dict())
    other: Any = Wrapper(second)
    other.load_state_dict(wrapped.state_dict())
    assert second._steps == 4
    advance(kind, model, wrapped, 4, first=4)
    advance(kind, twin, other, 4, first=4)
    close(model, twin, 0.0)


def test_a_warm_up_through_a_wrapper_is_part_of_the_state() -> None:
    model, twin = network(), network()
    loader = [batch(step) for step in range(30)]
    first, second = (kf.optim.KFAC(m, kf.Categorical(), lr=0.1, ema=0.9) for m in (model, twin))
    wrapped: Any = Wrapper(first)
    for optimizer in (wrapped, second):
        for _ in range(2):
            optimizer.warm_up(loader)
    assert first.state_dict()["kronfac"]["warmed"] == 60
    assert wrapped.state_dict()["kronfac"]["warmed"] == 60
    train(model, wrapped, 3)
    train(twin, second, 3)
    close(model, twin, 0.0)
