"""A stand-in of Avalanche 0.6's interface: hooks in their order, attributes of a strategy, data sets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import nn
from torch.utils.data import default_collate


class Data(list[tuple[Any, ...]]):
    """Items ``(input, target, task label)``, with what the library's data sets have beside them."""

    collate_fn = staticmethod(default_collate)

    def train(self) -> Self:
        return self


class Naive:
    """Trains one experience after the other and calls plugins by the names of their hooks, as Avalanche does."""

    train_mb_size = 10

    def __init__(self, model: nn.Module, plugins: list[object], lr: float = 0.02) -> None:
        self.model, self.plugins = model, plugins
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        self.loss, self.experience, self.adapted_dataset = torch.zeros(1), None, None

    def trigger(self, event: str, **kwargs: object) -> None:
        for plugin in self.plugins:
            if hasattr(plugin, event):
                getattr(plugin, event)(self, **kwargs)

    def adapt_data(self, experience: SimpleNamespace) -> Data:
        return experience.dataset.train()

    def train(self, experience: SimpleNamespace, steps: int = 40) -> None:
        self.experience = experience
        self.model.train()
        self.adapted_dataset = self.adapt_data(experience)
        for module in self.model.modules():
            if hasattr(module, "adaptation"):
                module.adaptation(experience)
        self.optimizer.param_groups[0]["params"] = list(self.model.parameters())
        self.trigger("before_training_exp", num_workers=0)
        x, y, labels = default_collate(self.adapted_dataset)
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss = torch.zeros(1)
            multi = hasattr(self.model, "forward_single_task")
            self.loss += nn.functional.cross_entropy(self.model(x, labels) if multi else self.model(x), y)
            self.trigger("before_backward", num_workers=0)
            self.loss.backward()
            self.optimizer.step()
        self.trigger("after_training_exp", num_workers=0)
        self.experience, self.adapted_dataset, self.loss = None, None, torch.zeros(1)


class Cumulative(Naive):
    """Trains on all data so far."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.dataset = Data()

    def adapt_data(self, experience: SimpleNamespace) -> Data:
        self.dataset = Data([*self.dataset, *experience.dataset])
        return self.dataset
