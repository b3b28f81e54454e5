"""PyTorch's conventions: groups, schedulers, gradient clipping, closures, frozen parameters."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tests.optim.hand_kfac import network
from tests.optim.loops import MAKERS, Mixed, batch, close, train
from tests.optim.unclipped import unclipped
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf


def test_groups_have_their_own_numbers() -> None:
    model = network()
    twins = [copy.deepcopy(model) for _ in range(2)]
    groups = [
        {"params": model[0].parameters(), "lr": 0.2, "damping": 0.5, "momentum": 0.5},
        {"params": [*model[2].parameters(), *model[4].parameters()], "weight_decay": 0.1},
    ]
    optimizer = unclipped(model, kf.Categorical(), lr=0.05, damping=0.1, source="exact", param_groups=groups)
    first = unclipped(twins[0], kf.Categorical(), lr=0.2, damping=0.5, momentum=0.5, source="exact")
    rest = unclipped(twins[1], kf.Categorical(), lr=0.05, damping=0.1, weight_decay=0.1, source="exact")
    for m, o in ((model, optimizer), (twins[0], first), (twins[1], rest)):
        train(m, o, 1)
    for index, twin in ((0, twins[0]), (2, twins[1]), (4, twins[1])):
        assert torch.equal(model[index].weight, twin[index].weight)
        assert torch.equal(model[index].bias, twin[index].bias)


def test_parameters_outside_all_groups_are_not_trained() -> None:
    model = network()
    optimizer = unclipped(model, kf.Categorical(), lr=0.1, param_groups=[{"params": [model[0].weight]}])
    before = copy.deepcopy(model)
    train(model, optimizer, 2)
    assert not torch.equal(model[0].weight, before[0].weight)
    assert torch.equal(model[0].bias, before[0].bias)
    assert torch.equal(model[4].weight, before[4].weight)


def test_groups_may_be_added_later() -> None:
    model = network()
    optimizer = unclipped(model, kf.Categorical(), lr=0.1, param_groups=[{"params": model[0].parameters()}])
    train(model, optimizer, 1)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.01})
    before = copy.deepcopy(model)
    train(model, optimizer, 1)
    assert not torch.equal(model[2].weight, before[2].weight)
    with pytest.raises(ValueError, match="no parameters of the model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError, match="lr=-1"):
        optimizer.add_param_group({"params": model[4].parameters(), "lr": -1.0})
    assert len(optimizer.param_groups) == 2


def test_schedulers_change_the_rate() -> None:
    moves: list[float] = []
    model = network()
    optimizer = unclipped(model, kf.Categorical(), lr=0.1, momentum=0.0, ema=0.0, source="exact", stats_every=1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    start = copy.deepcopy(model.state_dict())
    for _ in range(3):
        model.load_state_dict(start)
        train(model, optimizer, 1)
        moves.append(float((model[0].weight.detach() - start["0.weight"]).norm()))
        scheduler.step()
    assert moves[1] == pytest.approx(moves[0] / 10, rel=1e-2)
    assert moves[2] == pytest.approx(moves[0] / 100, rel=1e-2)
    assert scheduler.get_last_lr() == [pytest.approx(1e-4)]


def test_one_cycle_cycles_the_momentum() -> None:
    model = network()
    optimizer = unclipped(model, kf.Categorical(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    momenta = []
    for step in range(8):
        train(model, optimizer, 1, first=step)
        momenta.append(optimizer.param_groups[0]["momentum"])
        scheduler.step()
    assert min(momenta) < 0.88
    assert max(momenta) > 0.94


def test_clipped_gradients_are_what_is_preconditioned() -> None:
    model, scaled = network(), network()
    optimizers = [unclipped(m, kf.Categorical(), lr=0.1, momentum=0.0) for m in (model, scaled)]
    x, y = batch(0)
    norms = []
    for m in (model, scaled):
        F.cross_entropy(m(x), y).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(m.parameters(), 1e-3 if m is model else 1e9)))
    for optimizer in optimizers:
        optimizer.step()
    start, factor = network(), 1e-3 / norms[1]
    for p, q, s in zip(model.parameters(), scaled.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(p - s, factor * (q - s), rtol=1e-2, atol=1e-12)


def test_closures_are_called_once_and_return_the_loss() -> None:
    model, twin = network(), network()
    optimizer, other = (unclipped(m, kf.Categorical(), lr=0.1) for m in (model, twin))
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        x, y = batch(0)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        calls.append(1)
        return loss

    loss = optimizer.step(closure)
    train(twin, other, 1)
    x, y = batch(0)
    assert len(calls) == 1
    assert loss.item() == pytest.approx(F.cross_entropy(network()(x), y).item())
    close(model, twin, 0.0)
    with torch.no_grad():
        assert optimizer.step(closure) is not None
    assert other.step.__doc__


def test_gradients_survive_the_step() -> None:
    model = network()
    optimizer = unclipped(model, kf.Categorical(), lr=0.1, weight_decay=0.1, kl_clip=1e-5)
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_the_loss_and_the_gradients_are_those_without_the_optimiser() -> None:
    model, twin = network(), network()
    kf_optimizer = unclipped(model, kf.Categorical(), lr=0.1)
    x, y = batch(0)
    losses = [F.cross_entropy(m(x), y) for m in (model, twin)]
    for loss in losses:
        loss.backward()
    assert torch.equal(losses[0], losses[1])
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert kf_optimizer._gatherer.gathered == 1


def test_parameters_without_gradients_stay() -> None:
    model = network()
    optimizer = unclipped(model, kf.Categorical(), lr=0.1, weight_decay=0.1)
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    model[2].weight.grad = None
    before = copy.deepcopy(model)
    optimizer.step()
    assert torch.equal(model[2].weight, before[2].weight)
    assert not torch.equal(model[2].bias, before[2].bias)


def test_parameters_may_be_frozen_later() -> None:
    model = network()
    optimizer = unclipped(model, kf.Categorical(), lr=0.1)
    train(model, optimizer, 2)
    model[0].requires_grad_(False)
    optimizer.zero_grad()
    before = copy.deepcopy(model)
    train(model, optimizer, 2, first=2)
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[2].weight, before[2].weight)


def test_frozen_parameters_are_neither_gathered_nor_moved() -> None:
    model = network()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    before = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = unclipped(model, kf.Categorical(), lr=0.1)
    train(model, optimizer, 2)
    assert optimizer.curvature().parameter_names == ("2.weight", "4.weight", "4.bias")
    assert torch.equal(model[0].weight, before[0].weight)
    assert torch.equal(model[2].bias, before[2].bias)
    assert not torch.equal(model[2].weight, before[2].weight)


# ---------------------------------------------------------------------------------------------- steps left out
SKIPPED = "left no gradients and returned no loss that has any: the step was left out"


@pytest.mark.parametrize("kind", ["KFAC", "EKFAC", "TKFAC", "so", "q"])
@pytest.mark.parametrize("forward", [False, True])
def test_a_closure_with_nothing_to_step_in_leaves_the_step_out(kind: str, forward: bool) -> None:
    """As frameworks pass one for a batch that ``training_step`` skips, and for a pass that renews batch norm alone."""
    models = [network() for _ in range(2)]
    if kind in ("so", "q"):
        optimizers = [kf.optim.KLDWRM(m, kf.Categorical(), 5.0, variant=kind, source="exact") for m in models]
    else:
        optimizers = [getattr(kf.optim, kind)(m, kf.Categorical(), lr=0.1, source="exact") for m in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 2)
    (model, twin), (optimizer, other) = models, optimizers

    def closure() -> Tensor | None:
        loss = F.cross_entropy(model(batch(7)[0]), batch(7)[1]) if forward else None
        optimizer.zero_grad()
        return None if loss is None else loss.detach()

    steps = optimizer._steps
    with pytest.warns(RuntimeWarning, match=SKIPPED):
        assert (optimizer.step(closure) is None) == (not forward)
    assert optimizer._steps == steps
    close(model, twin, 0.0)
    if forward and kind not in ("so", "q"):  # its statistics stay in the running averages, as of any forward
        return
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, 4, first=2)
    close(model, twin, 0.0)


def test_what_only_the_fallback_moves_is_a_step() -> None:
    model = Mixed()
    with pytest.warns(kf.CoverageWarning):
        optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1, burn_in=0, fallback=MAKERS["sgd"])
    train(model, optimizer, 1)
    model.layer.requires_grad_(False)
    before = model.bilinear.weight.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch(0)[0]), batch(0)[1])
        loss.backward()
        return loss

    optimizer.step(closure)
    assert not torch.equal(before, model.bilinear.weight)
