"""Layers that some forwards of a loss do not call: their gradients are zero there, and count."""

from __future__ import annotations

import pytest
import torch
from tests.exactness_helpers import double, draw, relative
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf

LABELS = torch.arange(6) % 3


class Heads(nn.Module):
    """A trunk, and a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.heads = nn.Linear(4, 5), nn.ModuleList(nn.Linear(5, 3) for _ in range(3))
        double(self)

    def forward(self, x: Tensor, task: int) -> Tensor:
        return self.heads[task](torch.tanh(self.trunk(x)))


def loader() -> list[tuple[tuple[Tensor, int], Tensor]]:
    return [((draw(6, 4, seed=task), task), LABELS) for task in (0, 1, 1, 2)]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_blocks_are_those_of_the_whole_loss(reduction: str) -> None:
    model, likelihood = Heads(), kf.Categorical(reduction=reduction)
    found = kf.estimate(model, likelihood, loader(), approximation="dense", source="exact")
    wanted = kf.GaussNewtonOperator(model, likelihood, loader()).to_dense()
    sizes = [p.numel() for p in model.parameters()]
    first = 0
    for name, (weight, bias) in zip(found.blocks, zip(sizes[::2], sizes[1::2], strict=True), strict=True):
        at = slice(first, first + weight + bias)
        first += weight + bias
        part = found.to_dense()[at, at]
        assert relative(part, wanted[at, at]) < 1e-10, name


@pytest.mark.parametrize(
    "approximation", ["diagonal", "kfac", "tkfac", "ekfac", "tekfac", "sua", "prong", "xkfac", "nearest_kronecker"]
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_approximation_scales_as_the_share_of_the_terms(approximation: str, reduction: str) -> None:
    """The head of the first task alone, against the same head with nothing else in the loss."""
    model, likelihood = Heads(), kf.Categorical(reduction=reduction)
    pairs = loader()
    model.heads[1].requires_grad_(False)
    model.heads[2].requires_grad_(False)
    one = kf.estimate(model, likelihood, pairs[:1], approximation=approximation, source="exact").blocks["heads.0"]
    for order in (pairs, pairs[::-1]):
        all_ = kf.estimate(model, likelihood, order, approximation=approximation, source="exact").blocks["heads.0"]
        share = 0.25 if reduction == "mean" else 1.0
        torch.testing.assert_close(all_.to_dense(), share * one.to_dense(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("approximation", ["kfac", "tkfac", "diagonal", "dense", "sua"])
@pytest.mark.parametrize("backwards", [False, True])
def test_an_accumulated_sum_counts_layers_that_its_first_forward_does_not_call(
    approximation: str, backwards: bool
) -> None:
    model, likelihood = Heads(), kf.Categorical(reduction="sum")
    optimizer = kf.optim.KFAC(
        model, likelihood, lr=0.1, source="exact", stats_every=1, kl_clip=None, approximation=approximation
    )
    pairs = loader()[::-1] if backwards else loader()
    for (x, task), y in pairs:
        F.cross_entropy(model(x, task), y, reduction="sum").backward()
    wanted = kf.estimate(model, likelihood, pairs, approximation=approximation, source="exact").blocks
    for name, block in optimizer.curvature().blocks.items():
        torch.testing.assert_close(block.to_dense(), wanted[name].to_dense(), rtol=1e-10, atol=1e-12)
    optimizer.step()


def test_an_accumulated_step_is_that_of_the_whole_loss() -> None:
    model = Heads()
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1, damping=0.1, source="exact", stats_every=1, kl_clip=None)
    for _ in range(2):  # the second step has another loss of its own
        optimizer.zero_grad()
        for (x, task), y in loader():
            (F.cross_entropy(model(x, task), y) / 4).backward()
        wanted = kf.estimate(model, kf.Categorical(), loader(), source="exact").blocks
        before = {name: b.to_dense() for name, b in optimizer.curvature().blocks.items()}
        if optimizer._steps == 0:
            for name, block in wanted.items():
                torch.testing.assert_close(before[name], block.to_dense(), rtol=1e-10, atol=1e-12)
        optimizer.step()


def test_a_step_that_does_not_call_a_layer_says_nothing_of_it() -> None:
    model = Heads()
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.0, source="exact", stats_every=1, ema=0.5)
    for (x, task), y in loader():
        optimizer.zero_grad()
        F.cross_entropy(model(x, task), y).backward()
        optimizer.step()
    (x, _), y = loader()[0]
    found = optimizer.curvature().blocks["heads.0"]
    model.heads[1].requires_grad_(False)
    model.heads[2].requires_grad_(False)
    wanted = kf.estimate(model, kf.Categorical(), [((x, 0), y)], source="exact").blocks["heads.0"]
    torch.testing.assert_close(found.to_dense(), wanted.to_dense(), rtol=1e-10, atol=1e-12)


class Experts(nn.Module):
    """Each example goes to one expert, who may get none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), nn.Linear(4, 3)
        double(self)

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        out = x
        for index, layer in enumerate(self.experts):
            own = (expert == index).nonzero()[:, 0]
            out = out.index_add(0, own, layer(x[own]))
        return self.head(out)


def test_experts_without_examples() -> None:
    model, x = Experts(), draw(6, 4)
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1, stats_every=1)
    before = model.experts[1].weight.detach().clone()
    for expert in (torch.zeros(6, dtype=torch.long), LABELS.clamp(max=1)):
        optimizer.zero_grad()
        F.cross_entropy(model(x, expert), LABELS).backward()
        optimizer.step()
        assert torch.equal(model.experts[1].weight, before) == (not bool(expert.any()))
    with pytest.raises(RuntimeError, match=r"experts\.1.*never called them"):
        kf.estimate(model, kf.Categorical(), [((x, torch.zeros(6, dtype=torch.long)), LABELS)])


class Slots(nn.Module):
    """An expert that is asked once for each slot, of which all but one are empty."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.first, self.expert, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.last = last
        double(self)

    def forward(self, x: Tensor, empty: bool = True) -> Tensor:
        h = torch.tanh(self.first(x))
        none = [self.expert(h[:0])] if empty else []
        full = [self.expert(h)]
        return self.head(torch.cat(none + full if self.last else full + none))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("approximation", ["kfac", "dense"])
def test_calls_without_rows_beside_one_with_rows_do_not_count(last: bool, approximation: str) -> None:
    model, x = Slots(last), draw(6, 4)
    found, wanted = (
        kf.estimate(model, kf.Categorical(), ((x, empty), LABELS), approximation=approximation, source="exact")
        for empty in (True, False)
    )
    torch.testing.assert_close(found.to_dense(), wanted.to_dense(), rtol=1e-12, atol=1e-14)


class Branches(nn.Module):
    """A layer, or a frozen one in its place, and a parameter without a block behind both."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.trained = nn.Parameter(torch.ones(3)), nn.Linear(4, 3)
        self.frozen = nn.Linear(4, 3).requires_grad_(False)
        double(self)

    def forward(self, x: Tensor, trained: bool) -> Tensor:
        return self.scale * (self.trained if trained else self.frozen)(x)


@pytest.mark.filterwarnings("ignore::kronfac.estimator.CoverageWarning")
@pytest.mark.parametrize("source", ["exact", "empirical", "forward_only"])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_forwards_that_call_no_layer_with_a_block_count(source: str, first: bool, reduction: str) -> None:
    model, x, likelihood = Branches(), draw(6, 4), kf.Categorical(reduction=reduction)
    pairs = [((x, trained), LABELS) for trained in (first, not first)]
    found = kf.estimate(model, likelihood, pairs, source=source)
    wanted = kf.estimate(model, likelihood, [((x, True), LABELS)], source=source)
    share = 0.5 if reduction == "mean" else 1.0
    torch.testing.assert_close(found.to_dense(), share * wanted.to_dense(), rtol=1e-12, atol=1e-14)
