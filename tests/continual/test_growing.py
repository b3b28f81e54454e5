"""Experiences of networks that change between them, on stand-ins of Avalanche's modules: heads, larger classifiers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.continual.avalanche_standin import Cumulative, Data, Naive
from torch import Tensor, nn

import kronfac as kf
from kronfac.continual import AvalanchePlugin, QuadraticPenalty
from kronfac.continual.growing import on_all_layers


class Incremental(nn.Module):
    """One classifier, whose units become more; as in the library, it is another layer then."""

    def __init__(self, *, bn: bool = False) -> None:
        super().__init__()
        norm = [nn.BatchNorm1d(5)] if bn else []
        self.body = nn.Sequential(nn.Linear(4, 5), *norm, nn.Tanh())
        self.classifier = nn.Linear(5, 2)

    @torch.no_grad()
    def adaptation(self, experience: SimpleNamespace) -> None:
        old, units = self.classifier, max(experience.classes) + 1
        if units <= old.out_features:
            return
        self.classifier = nn.Linear(5, units).to(old.weight)
        self.classifier.weight[: old.out_features] = old.weight
        self.classifier.bias[: old.out_features] = old.bias

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.classifier(self.body(x))
        return outputs


class MultiHead(nn.Module):
    """A head for each task label, which the library knows as a multi-task module by its base class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.heads = nn.ModuleDict({"0": nn.Linear(5, 2)})

    def adaptation(self, experience: SimpleNamespace) -> None:
        for label in {str(item[-1]) for item in experience.dataset}:
            if label not in self.heads:
                self.heads[label] = nn.Linear(5, 2).to(self.body[0].weight)

    def forward_single_task(self, x: Tensor, label: int) -> Tensor:
        # Indexed assignments below change it in place, as masks of unknown classes do.
        outputs: Tensor = self.heads[str(label)](self.body(x))
        return outputs

    def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
        outputs = x.new_zeros(len(x), 2)
        for label in task_labels.unique():
            of_task = task_labels == label
            outputs[of_task] = self.forward_single_task(x[of_task], int(label))
        return outputs


def experience(task: int, *classes: int) -> SimpleNamespace:
    draw = torch.Generator().manual_seed(task)
    x = torch.randn(30, 4, generator=draw, dtype=torch.float64)
    y = torch.randint(0, len(classes), (30,), generator=draw)
    return SimpleNamespace(dataset=Data((x[i], classes[int(y[i])], task) for i in range(30)), classes=classes)


class Witness:
    """Listens beside the plugin and keeps dense curvatures and anchors of its own."""

    def __init__(self, plugin: AvalanchePlugin) -> None:
        self.plugin = plugin
        self.taken: list[tuple[kf.BlockDiagonal, dict[str, Tensor]]] = []

    def after_training_exp(self, strategy: Naive, **_: object) -> None:
        model, task = strategy.model, len(self.taken)
        items = [
            strategy.experience.dataset[i] for i in torch.randperm(30, generator=torch.Generator().manual_seed(task))
        ]
        inputs, targets, labels = (
            torch.stack([torch.as_tensor(part) for part in parts]) for parts in zip(*items, strict=True)
        )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("heads" not in name or f"heads.{task}." in name)
        pair = (inputs, labels) if isinstance(model, MultiHead) else inputs, targets
        curvature = kf.estimate(
            model, kf.Categorical(), [pair], approximation=self.plugin.approximation, source="sampled", seed=task
        )
        model.requires_grad_()
        self.taken.append((curvature, {name: p.detach().clone() for name, p in model.named_parameters()}))

    def penalty(self, model: nn.Module) -> Tensor:
        """The sum of quadratic forms, each in the entries that there were."""
        total = torch.zeros((), dtype=torch.float64)
        for curvature, own in self.taken:
            anchor = self.taken[-1][1] if self.plugin.online else own
            deltas = []
            for name, shape in curvature.parameter_shapes.items():
                corner = tuple(slice(n) for n in shape)
                deltas.append((model.get_parameter(name)[corner] - anchor[name][corner]).flatten())
            delta = torch.cat(deltas)
            total = total + 0.5 * self.plugin.strength * delta @ curvature.to_dense() @ delta
        return total


def learned(model: nn.Module, stream: list[SimpleNamespace], **settings: Any) -> tuple[AvalanchePlugin, Witness, Naive]:
    torch.manual_seed(3)
    plugin = AvalanchePlugin(kf.Categorical(), strength=3.0, **settings)
    witness = Witness(plugin)
    strategy = Naive(model.double(), [plugin, witness])
    strategy.train_mb_size = 30
    for current in stream:
        strategy.train(current, steps=3)
    return plugin, witness, strategy


def agrees(plugin: AvalanchePlugin, witness: Witness, model: nn.Module) -> None:
    """Compare what is added to a loss, and its gradient."""
    parameters = list(model.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))
    strategy = SimpleNamespace(model=model, loss=torch.zeros(1, dtype=torch.float64))
    plugin.before_backward(strategy)
    expected = witness.penalty(model)
    assert float(expected.detach()) > 1e-4
    torch.testing.assert_close(strategy.loss[0], expected, rtol=1e-10, atol=0)
    pair = (torch.autograd.grad(value, parameters, materialize_grads=True) for value in (strategy.loss[0], expected))
    torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-12)


GROWING = [experience(0, 0, 1), experience(0, 2), experience(0, 3, 4)]
HEADS = [experience(0, 0, 1), experience(1, 0, 1), experience(2, 0, 1)]


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("approximation", ["kfac", "ekfac", "tkfac", "xkfac", "diagonal", "dense"])
def test_classifiers_may_become_larger(approximation: str, online: bool) -> None:
    model = Incremental(bn=approximation == "xkfac")
    plugin, witness, _ = learned(model, GROWING, approximation=approximation, online=online, combine="exact")
    model.adaptation(experience(0, 6))  # as a test of a later experience may do
    agrees(plugin, witness, model)


@pytest.mark.parametrize(
    ("approximation", "combine", "online"),
    [("kfac", "exact", True), ("kfac", "exact", False), ("ekfac", "exact", True), ("diagonal", "nearest", True)],
)
def test_each_task_has_a_head(approximation: str, combine: str, online: bool) -> None:
    model = MultiHead()
    plugin, witness, _ = learned(model, HEADS, approximation=approximation, online=online, combine=combine)
    agrees(plugin, witness, model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("combine", ["nearest", "factors"])
def test_a_head_keeps_the_curvature_of_its_own_task(combine: str) -> None:
    plugin, witness, strategy = learned(MultiHead(), HEADS, combine=combine)
    assert isinstance(plugin.penalty, QuadraticPenalty)
    (_, total), *others = plugin.penalty.parts
    assert not others
    for task, (curvature, _) in enumerate(witness.taken):
        layer = f"heads.{task}"
        torch.testing.assert_close(total.blocks[layer].to_dense(), curvature.blocks[layer].to_dense())
    assert set(plugin.penalty.parameter_names) == set(dict(strategy.model.named_parameters()))


def test_batches_of_multi_task_models_have_one_task() -> None:
    mixed = SimpleNamespace(dataset=Data([*HEADS[0].dataset, *HEADS[1].dataset]), classes=(0, 1))
    model = MultiHead().double()
    model.adaptation(mixed)
    plugin = AvalanchePlugin(kf.Categorical(), batch_size=8)
    strategy = SimpleNamespace(model=model, experience=mixed, train_mb_size=30)
    labels = [inputs[1].unique().tolist() for inputs, _ in plugin._batches(strategy, 0)]
    assert sorted(labels) == [[0]] * 4 + [[1]] * 4
    plugin.after_training_exp(strategy)
    assert isinstance(plugin.penalty, QuadraticPenalty)
    assert len(plugin.penalty.parameter_names) == 6


def test_layers_may_be_frozen_and_trained_again() -> None:
    model = Incremental()
    plugin, _, strategy = learned(model, [experience(0, 0, 1)], combine="exact")
    assert isinstance(plugin.penalty, QuadraticPenalty)
    first = plugin.penalty.parts[0][1].blocks["body.0"].to_dense()
    model.body.requires_grad_(False)
    strategy.plugins.pop()
    strategy.train(experience(1, 0, 1), steps=1)
    parts = plugin.penalty.parts
    torch.testing.assert_close(sum(part.blocks["body.0"].to_dense() for _, part in parts), first)
    model.body.requires_grad_(True)
    strategy.train(experience(2, 0, 1), steps=1)
    assert plugin.penalty.tasks == 3


def test_data_of_earlier_experiences_is_not_taken_in_twice() -> None:
    found = []
    for kind in (Naive, Cumulative):
        torch.manual_seed(0)
        plugin = AvalanchePlugin(kf.Categorical(), combine="exact", approximation="dense")
        strategy = kind(Incremental().double(), [plugin])
        for current in (experience(0, 0, 1), experience(1, 0, 1)):
            strategy.train(current, steps=0)
        assert isinstance(plugin.penalty, QuadraticPenalty)
        found.append(plugin.penalty.parts[0][1].to_dense())
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("approximation", ["kkfac", "kfac_tridiagonal"])
def test_curvature_that_couples_layers_is_refused_before_a_larger_one_is_trained(approximation: str) -> None:
    with pytest.raises(NotImplementedError, match=r"where parameters .* 'classifier.weight', .* pass online=False"):
        learned(Incremental(), GROWING, approximation=approximation, combine="exact")
    plugin, _, _ = learned(Incremental(), GROWING, approximation=approximation, online=False)
    assert plugin.penalty is not None


@pytest.mark.parametrize(
    ("small", "large", "data"),
    [
        (nn.Linear(3, 4), nn.Linear(5, 6), torch.randn(9, 3)),
        (nn.Linear(3, 4, bias=False), nn.Linear(5, 4, bias=False), torch.randn(9, 3)),
        (
            nn.Sequential(nn.Embedding(3, 4), nn.Flatten()),
            nn.Sequential(nn.Embedding(5, 6)),
            torch.arange(9)[:, None] % 3,
        ),
        (nn.Conv1d(2, 3, 2), nn.Conv1d(3, 4, 2), torch.randn(9, 2, 4)),
        (nn.ConvTranspose1d(2, 3, 2), nn.ConvTranspose1d(3, 4, 2), torch.randn(9, 2, 4)),
    ],
)
@pytest.mark.parametrize("approximation", ["kfac", "ekfac", "diagonal", "dense"])
def test_blocks_are_laid_out_in_larger_layers(
    small: nn.Module, large: nn.Module, data: Tensor, approximation: str
) -> None:
    likelihood = kf.Gaussian()
    estimates = []
    for model in (small.double(), large.double()):
        x = data if data.dtype == torch.long else data.double()
        wide = next(model.parameters()).shape
        if x.ndim > 1 and x.dtype != torch.long:
            columns = wide[0] if isinstance(model, nn.ConvTranspose1d) else wide[1]
            x = torch.cat([x, x], 1)[:, :columns]
        estimates.append(kf.estimate(model, likelihood, (x, torch.zeros_like(model(x))), approximation=approximation))
    old, new = estimates
    vector = {name: torch.randn_like(p) for name, p in large.named_parameters()}
    cut = {name: vector[name][tuple(slice(n) for n in shape)] for name, shape in old.parameter_shapes.items()}
    ((_, laid),), same = on_all_layers(((1.0, old),), new, list(vector))
    torch.testing.assert_close(laid.quadratic_form(vector), old.quadratic_form(cut))
    assert same.quadratic_form(vector) == new.quadratic_form(vector)


def test_other_changes_of_layers_are_refused() -> None:
    data = torch.randn(9, 4, 4)
    groups = [nn.Conv1d(4, width, 2, groups=2) for width in (4, 8)]
    old, new = (kf.estimate(layer, kf.Gaussian(), (data, torch.zeros_like(layer(data)))) for layer in groups)
    for first, second in ((old, new), (new, old)):
        with pytest.raises(NotImplementedError, match="layer '' changed in a way that its curvature cannot follow"):
            on_all_layers(((1.0, first),), second, ["weight", "bias"])
