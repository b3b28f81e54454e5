"""Forwards belong to one step until their gradients came back and were thrown away."""

from __future__ import annotations

import pytest
import torch
from tests.exactness_helpers import draw
from tests.optim.gathering_helpers import LABELS, estimated, factors, make, same
from tests.optim.hand_kfac import network
from torch.nn import functional as F

import kronfac as kf


@pytest.mark.parametrize("kind", ["inputs", "outputs", "backward"])
def test_derivatives_in_the_inputs_belong_to_a_loss_that_is_being_formed(kind: str) -> None:
    """A gradient penalty, or a physics-informed network, before the second forward of a step."""
    model, x, other = network(), draw(8, 3).requires_grad_(), draw(8, 3, seed=1)
    wanted = estimated(network(), (x.detach(), None), (other, None))
    optimizer = make(model, stats_every=1)
    optimizer.zero_grad()
    z = model(x)
    loss = F.cross_entropy(z, LABELS)
    if kind == "backward":
        z.sum().backward(inputs=[x], retain_graph=True)
    else:
        at = x if kind == "inputs" else z
        (slope,) = torch.autograd.grad(F.cross_entropy(z, LABELS), at, create_graph=True)
        loss = loss + slope.square().sum()
    (loss + F.cross_entropy(model(other), LABELS)).backward()
    assert optimizer._gatherer.gathered == 2
    optimizer.step()
    same(factors(optimizer), wanted)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("by", ["backward", "grad"])
def test_a_step_that_was_left_out_is_no_part_of_the_next(set_to_none: bool, by: str) -> None:
    model, x = network(), draw(8, 3)
    likelihood = kf.Categorical(reduction="sum")
    optimizer = make(model, likelihood=likelihood, ema=0.0)
    for _ in range(3):
        optimizer.zero_grad(set_to_none)
        loss = F.cross_entropy(model(x), LABELS, reduction="sum")
        if by == "backward":
            loss.backward()
        else:
            torch.autograd.grad(loss, list(model.parameters()))
    same(factors(optimizer), estimated(model, (x, None), likelihood=likelihood))
    assert optimizer._gatherer.gathered == 1


def test_an_empty_batch_is_named() -> None:
    model = network()
    optimizer = make(model)
    with pytest.raises(kf.TapeError, match="the batch is empty"):
        model(draw(0, 3))
    model(draw(8, 3))
    assert optimizer._gatherer.gathered == 1


def test_a_functional_call_of_the_model_says_what_to_do() -> None:
    model, x = network(), draw(8, 3)
    optimizer = make(model)
    fast = {name: p.detach() for name, p in model.named_parameters()}
    with pytest.raises(kf.TapeError, match=r"functional_call.*optimizer\.paused\(\)"):
        torch.func.functional_call(model, fast, (x,))
    with optimizer.paused():
        torch.func.functional_call(model, fast, (x,))
    with optimizer.capture() as capture:
        capture(torch.func.functional_call(model, dict(model.named_parameters()), (x,)))
    same(factors(optimizer), estimated(network(), (x, None)))
