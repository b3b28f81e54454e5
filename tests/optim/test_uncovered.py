"""Parameters without curvature, on the plain gradient or trained by a fallback."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.exactness_helpers import draw
from tests.optim.hand_kfac import network
from tests.optim.loops import MAKERS, Mixed, batch, train
from tests.optim.unclipped import unclipped
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.optim.options import inner_product


def test_uncovered_parameters_take_the_plain_gradient_with_one_warning() -> None:
    model = Mixed()
    with pytest.warns(kf.CoverageWarning) as caught:
        optimizer = unclipped(model, kf.Categorical(), lr=0.1, momentum=0.0)
    (warning,) = caught
    for name in ("Trained without curvature", "bilinear.weight", "bilinear.bias", "scale"):
        assert name in str(warning.message)
    before = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1)
    for name in ("bilinear.weight", "bilinear.bias", "scale"):
        p, q = model.get_parameter(name), before.get_parameter(name)
        torch.testing.assert_close(p.detach(), q.detach() - 0.1 * p.grad)
    assert not torch.allclose(model.layer.weight, before.layer.weight - 0.1 * model.layer.weight.grad)


def fallback_pair(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], **options: Any
) -> tuple[Mixed, kf.optim.KFAC, Mixed, torch.optim.Optimizer]:
    """The optimiser with a fallback, and a twin whose uncovered parameters the same fallback trains alone."""
    model, twin = Mixed(), Mixed()
    with pytest.warns(kf.CoverageWarning, match="Trained by fallback"):
        optimizer = unclipped(model, kf.Categorical(), lr=0.1, fallback=make, **options)
    return model, optimizer, twin, make([*twin.bilinear.parameters(), twin.scale])


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_fallback_trains_what_has_no_curvature(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
    model, optimizer, twin, alone = fallback_pair(make, average=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    averages = []
    for step in range(4):
        x, y = batch(step)
        twin.layer.load_state_dict(model.layer.state_dict())
        twin.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        for group in alone.param_groups:
            group["lr"] = make([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] * 0.5**step
        alone.step()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        for name in ("bilinear.weight", "bilinear.bias", "scale"):
            torch.testing.assert_close(model.get_parameter(name), twin.get_parameter(name), rtol=1e-12, atol=1e-13)
        averages.append(model.scale.detach().clone())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    wanted = averages[0]
    for step, value in enumerate(averages[1:], 1):
        weight = max(0.5, 1 / (step + 1))
        wanted = (1 - weight) * wanted + weight * value
    with optimizer.averaged():
        torch.testing.assert_close(model.scale.detach(), wanted)


@pytest.mark.filterwarnings("ignore::kronfac.CoverageWarning")
def test_a_fallback_must_be_an_optimiser() -> None:
    with pytest.raises(TypeError, match=r"fallback must return a torch\.optim\.Optimizer, not list"):
        unclipped(Mixed(), kf.Categorical(), lr=0.1, fallback=lambda ps: ps)  # type: ignore[arg-type,return-value]
    assert unclipped(network(), kf.Categorical(), lr=0.1, fallback=MAKERS["adam"])._fallback is None


# ---------------------------------------------------------------------------------------------- not reached
class ActorCritic(nn.Module):
    """Two heads, of which the likelihood sees one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.policy, self.value = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 1)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.trunk(x))
        return self.policy(hidden), self.value(hidden)


def both(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x, y = draw(24, 4), torch.arange(24) % 3
    for _ in range(steps):
        optimizer.zero_grad()
        policy, value = model(x)
        (F.cross_entropy(policy, y) + value.square().mean()).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["KFAC", "EKFAC", "TKFAC"])
def test_layers_that_the_outputs_do_not_depend_on_take_the_plain_gradient(kind: str) -> None:
    model = ActorCritic()
    optimizer = getattr(kf.optim, kind)(
        model, kf.Categorical(), lr=0.1, momentum=0.0, kl_clip=None, outputs=lambda out: out[0]
    )
    before = copy.deepcopy(model)
    with pytest.warns(kf.CoverageWarning, match=r"value\.weight, value\.bias \(the outputs that the likelihood"):
        both(model, optimizer, 1)
    for name in ("value.weight", "value.bias"):
        p, q = model.get_parameter(name), before.get_parameter(name)
        torch.testing.assert_close(p.detach(), q.detach() - 0.1 * p.grad)
    p, q = model.policy.weight, before.policy.weight
    assert not torch.allclose(p.detach(), q.detach() - 0.1 * p.grad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both(model, optimizer, 12)  # between two gatherings too, and without another word


def test_what_is_not_reached_is_part_of_the_state() -> None:
    def make() -> tuple[ActorCritic, kf.optim.KFAC]:
        model = ActorCritic()
        return model, kf.optim.KFAC(model, kf.Categorical(), lr=0.1, burn_in=1, outputs=lambda out: out[0])

    model, optimizer = make()
    with pytest.warns(kf.CoverageWarning):
        both(model, optimizer, 13)
    other, resumed = make()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    both(model, optimizer, 4)
    with pytest.warns(kf.CoverageWarning):
        both(other, resumed, 4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_rows_keep_no_plain_gradient() -> None:
    class Wide(ActorCritic):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.policy, self.value = nn.Linear(4, 64), nn.Linear(64, 3), nn.Linear(64, 64)
            self.double()

    model = Wide()
    optimizer = unclipped(model, kf.Categorical(), lr=0.1, gradients="rows", outputs=lambda out: out[0])
    with pytest.raises(RuntimeError, match=r"value\.weight.*gradients='dense'"):
        both(model, optimizer, 1)


# ---------------------------------------------------------------------------------------------- closures
@pytest.mark.parametrize("kind", ["KFAC", "EKFAC", "TKFAC"])
def test_a_closure_that_leaves_no_gradients_is_refused(kind: str) -> None:
    model, x, y = network(), draw(24, 3), torch.arange(24) % 3
    optimizer = getattr(kf.optim, kind)(model, kf.Categorical(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"The closure left no gradients: it must call zero_grad\(\).*backward"):
        optimizer.step(lambda: F.cross_entropy(model(x), y))


@pytest.mark.parametrize("variant", ["so", "q"])
def test_kldwrm_differentiates_the_loss_that_a_closure_returns(variant: str) -> None:
    x, y = draw(24, 3), torch.arange(24) % 3
    models = [network() for _ in range(3)]
    optimizers = [kf.optim.KLDWRM(m, kf.Categorical(), 5.0, variant=variant, source="exact") for m in models]

    def loss(index: int) -> Tensor:
        return F.cross_entropy(models[index](x), y)

    def with_backward() -> Tensor:
        optimizers[1].zero_grad()
        found = loss(1)
        found.backward()
        return found

    for _ in range(3):
        optimizers[0].zero_grad()
        loss(0).backward()
        optimizers[0].step()
        optimizers[1].step(with_backward)
        optimizers[2].step(lambda: loss(2))
    for other in models[1:]:
        assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), other.parameters(), strict=True))
    optimizers[0].zero_grad()
    with pytest.raises(RuntimeError, match="left no gradients, and returned no loss"):
        optimizers[0].step(lambda: 1.0)


def test_inner_products_of_complex_gradients_are_those_of_their_parts() -> None:
    one, other = (torch.complex(draw(5, seed=s), draw(5, seed=s + 2)) for s in (1, 2))
    assert float(inner_product(one, other)) == pytest.approx(float((one.conj() * other).sum().real))
    assert float(inner_product(one.conj(), other)) == pytest.approx(float((one * other).sum().real))
    assert not inner_product(one, other).is_complex()
