"""The quadratic model in a few directions, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from tests.exactness_helpers import double, draw
from torch import Tensor, nn

import kronfac as kf
from kronfac.operators import ggn_gram
from kronfac.operators.passes import random_state, same_random_state
from kronfac.optim.quadratic import QuadraticModel, inner_products


def spd(size: int, seed: int) -> Tensor:
    root = draw(size, size, seed=seed)
    return root @ root.T


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_minimum_is_that_of_the_dense_model(count: int, damping: float) -> None:
    matrix, slope, directions = spd(7, 1), draw(7, seed=2), draw(count, 7, seed=3)
    model = QuadraticModel(directions @ slope, directions @ matrix @ directions.T, directions @ directions.T, 1e-16)
    found = model.minimise(damping)

    def value(coefficients: Tensor) -> Tensor:
        step = coefficients @ directions
        return slope @ step + 0.5 * step @ (matrix + damping * torch.eye(7, dtype=torch.float64)) @ step

    # By brute force: Newton's method on automatic derivatives of the dense model.
    start = torch.zeros(count, dtype=torch.float64)
    gradient = torch.func.grad(value)(start)
    wanted = -torch.linalg.solve(torch.func.hessian(value)(start), gradient)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)
    assert model.change(found, damping) == pytest.approx(float(value(found)), rel=1e-10)
    assert model.change(found, damping) == pytest.approx(0.5 * float(slope @ (found @ directions)), rel=1e-8)
    for nudge in 1e-3 * torch.eye(count, dtype=torch.float64):
        assert model.change(found, damping) < min(float(value(found + nudge)), float(value(found - nudge)))


def test_directions_that_are_the_same_are_one() -> None:
    matrix, slope, one = spd(5, 1), draw(5, seed=2), draw(1, 5, seed=3)
    directions = torch.cat((one, -2.0 * one))
    model = QuadraticModel(directions @ slope, directions @ matrix @ directions.T, directions @ directions.T, 1e-16)
    alone = QuadraticModel(one @ slope, one @ matrix @ one.T, one @ one.T, 1e-16)
    step = model.minimise(0.1) @ directions
    torch.testing.assert_close(step, alone.minimise(0.1) @ one, rtol=1e-8, atol=1e-10)


def test_a_zero_direction_takes_no_part() -> None:
    directions = torch.stack((draw(5, seed=3), torch.zeros(5, dtype=torch.float64)))
    matrix = spd(5, 1)
    model = QuadraticModel(directions @ draw(5), directions @ matrix @ directions.T, directions @ directions.T, 1e-16)
    assert model.minimise(0.1)[1] == 0.0


MODELS = {
    "tanh": lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)),
    "dropout": lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 1, 3)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 3),
    ),
}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("case", MODELS)
def test_gram_equals_the_dense_matrix(case: str, count: int) -> None:
    model = double(MODELS[case]())
    model.train()
    x = draw(6, 3)
    vectors = [{n: draw(*p.shape, seed=10 * i + 1) for n, p in model.named_parameters()} for i in range(count)]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = random_state(model)
    gram = ggn_gram(model, kf.Categorical(), x, vectors)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    # The Jacobian through the live model with the same masks, one output at a time.
    with same_random_state(model, state), torch.enable_grad():
        z = model(x)
        p = z.softmax(-1).detach()
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(z[n, c], list(model.parameters()), retain_graph=True)])
            for n in range(6)
            for c in range(3)
        ]
    jacobian = torch.stack(rows).reshape(6, 3, -1)
    flat = torch.stack([torch.cat([t.flatten() for t in v.values()]) for v in vectors])
    tangents = torch.einsum("ncp,vp->vnc", jacobian, flat)
    hessians = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    wanted = torch.einsum("vnc,ncd,wnd->vw", tangents, hessians, tangents) / 6
    torch.testing.assert_close(gram, wanted, rtol=1e-9, atol=1e-12)


def test_inner_products() -> None:
    left = [[draw(2, 3, seed=i), draw(4, seed=i + 5)] for i in range(2)]
    flat = torch.stack([torch.cat([t.flatten() for t in v]) for v in left])
    torch.testing.assert_close(inner_products(left, left), flat @ flat.T, rtol=1e-12, atol=1e-12)
