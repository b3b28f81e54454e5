"""Closures whose loss is made of derivatives: residuals of differential equations, forces of an energy."""

from __future__ import annotations

import pytest
import torch
from tests.exactness_helpers import double, draw
from torch import Tensor, nn

import kronfac as kf


class Residual(nn.Module):
    """``−u″`` inside and ``u`` on the border, by autograd within the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.network = double(nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)))

    def forward(self, inside: Tensor, border: Tensor) -> Tensor:
        x = inside.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.network(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return torch.cat([-second, self.network(border)])


class Forces(nn.Module):
    """``−dE/dx`` of an energy."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = double(nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)))

    def forward(self, inside: Tensor, border: Tensor) -> Tensor:
        x = torch.cat([inside, border]).detach().requires_grad_()
        return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("kind", [Residual, Forces])
def test_hessian_free_takes_the_dense_step(kind: type[nn.Module]) -> None:
    model, inside, border = kind(), draw(6, 1), draw(2, 1, seed=1)
    targets, lam = draw(8, 1, seed=2), 0.2
    outputs = model(inside, border)
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(z, parameters, retain_graph=True, materialize_grads=True) for z in outputs.flatten()]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    slope = jacobian.T @ (outputs - targets).detach().flatten() / 8
    full = jacobian.T @ jacobian / 8 + lam * torch.eye(len(slope), dtype=torch.float64)
    delta = -torch.linalg.solve(full, slope)
    wanted = delta * -float(slope @ delta) / float(delta @ full @ delta)
    before = nn.utils.parameters_to_vector(parameters).detach().clone()
    optimizer = kf.optim.HessianFree(
        model, kf.Gaussian(), damping=lam, precondition=False, tolerance=1e-12, progress=1e-15, max_iterations=500
    )
    optimizer.step(lambda: 0.5 * (model(inside, border) - targets).square().sum() / 8)
    torch.testing.assert_close(
        nn.utils.parameters_to_vector(parameters).detach() - before, wanted, rtol=1e-8, atol=1e-10
    )


def test_a_loss_may_differentiate_the_outputs_itself() -> None:
    model, x = double(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))), draw(7, 2)

    def loss() -> Tensor:
        points = x.clone().requires_grad_()
        outputs = model(points)
        (slope,) = torch.autograd.grad(outputs.sum(), points, create_graph=True)
        return 0.5 * outputs.square().mean() + 0.1 * slope.square().mean()

    optimizer = kf.optim.AdaptiveKFAC(model, kf.Gaussian())
    losses = [float(optimizer.step(loss)) for _ in range(6)]
    assert losses[-1] < 0.5 * losses[0]


def test_what_is_wrong_with_a_closure_is_still_said() -> None:
    model, x = double(nn.Sequential(nn.Linear(2, 1))), draw(5, 2)
    calls = 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RuntimeError("the data are gone")
        return model(x).square().mean()

    with pytest.raises(RuntimeError, match="the data are gone"):
        kf.optim.HessianFree(model, kf.Gaussian(), damping=1.0, precondition=False).step(loss)


def test_what_needs_blocks_names_what_does_not() -> None:
    model, x = Forces(), draw(5, 1)
    with pytest.raises(kf.TapeError, match=r"derivatives of the network.*HessianFree\(precondition=False\)"):
        kf.estimate(model, kf.Gaussian(), [((x, x), None)])
