"""The network that gives its own derivatives, and what curvature makes of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tests.exactness_helpers import block_errors, draw
from torch import Tensor

import kronfac as kf
from kronfac.experiments.models import ASKED, PoissonResidual, TaylorPerceptron
from kronfac.experiments.problems import get_problem


def hessian(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return torch.func.jacrev(torch.func.grad(function))


def plainly(network: TaylorPerceptron, point: Tensor) -> Tensor:
    values = point
    for index, layer in enumerate(network.layers):
        values = layer(torch.cat([values.tanh() if index else values, values.new_ones(1)]))
    return values.squeeze(0)


def test_value_and_laplacian_are_those_of_differentiation() -> None:
    network, points = TaylorPerceptron((3, 8, 7, 1)).double(), draw(5, 3)
    value, laplacian = network(points)
    hessians = torch.func.vmap(hessian(lambda x: plainly(network, x)))(points)
    torch.testing.assert_close(value[:, 0], torch.stack([plainly(network, x) for x in points]))
    torch.testing.assert_close(laplacian[:, 0], hessians.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-12, atol=1e-12)


def test_each_point_is_asked_what_its_row_says() -> None:
    network, points = TaylorPerceptron((2, 5, 1)).double(), draw(3, 2)
    rows = torch.cat([points, torch.tensor([[ASKED[w]] for w in ("equation", "border", "solution")]).double()], 1)
    value, laplacian = network(points)
    wanted = torch.stack([-laplacian[0], 10 * value[1], value[2]])
    torch.testing.assert_close(PoissonResidual(network)(rows), wanted)


def test_blocks_are_those_of_the_gauss_newton_matrix() -> None:
    model = PoissonResidual(TaylorPerceptron((2, 5, 4, 1))).double()
    rows = torch.cat([draw(6, 2), torch.tensor([0.0, 0, 0, 1, 1, 2]).double().unsqueeze(1)], 1)
    exact = kf.estimate(model, kf.Gaussian(), (rows, torch.zeros(6, 1).double()), approximation="dense", source="exact")
    assert max(block_errors(exact, model, kf.reference.ggn(model, kf.Gaussian(), rows)).values()) < 1e-10


def test_the_solution_solves_the_problem() -> None:
    data = get_problem("poisson").data()
    assert set(data.train_inputs[:, 2].tolist()) == {0.0, 1.0}
    border = data.train_inputs[data.train_inputs[:, 2] == 1, :2]
    assert ((border == 0) | (border == 1)).any(1).all()
    point = data.test_inputs[0, :2].double()

    def solution(x: Tensor) -> Tensor:
        return torch.sin(torch.pi * x).prod()

    assert torch.allclose(solution(point).float(), data.test_targets[0])
    minus = -hessian(solution)(point).diagonal().sum()
    assert torch.allclose(minus, 2 * torch.pi**2 * solution(point))
