"""Faults that were found in matrix-free operators, one test each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw, relative
from torch import Tensor, nn

import kronfac as kf

KINDS = [kf.GaussNewtonOperator, kf.HessianOperator]
X, Y = draw(20, 4), torch.arange(20) % 3


def model() -> nn.Module:
    return double(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)))


def vector_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: draw(*p.shape, seed=i) for i, (name, p) in enumerate(net.named_parameters())}


def flat(vector: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in vector.values()])


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_many_batches_in_16_bits_do_not_stand_still(kind: type[Any]) -> None:
    net = copy.deepcopy(model()).eval().bfloat16()
    x, y = draw(600, 4).bfloat16(), torch.arange(600) % 3
    vector = {name: tensor.bfloat16() for name, tensor in vector_of(net).items()}
    many = kind(net, kf.Categorical(), list(zip(x.split(1), y.split(1), strict=True))).matmul(vector)
    one = kind(copy.deepcopy(net).double(), kf.Categorical(), (x.double(), y)).matmul(
        {name: tensor.double() for name, tensor in vector.items()}
    )
    assert all(tensor.dtype == torch.bfloat16 for tensor in many.values())
    assert relative(flat(many).double(), flat(one)) < 0.01


def test_estimates_of_many_samples_in_16_bits_do_not_stand_still() -> None:
    net = double(nn.Linear(1, 3)).bfloat16()
    x, y = draw(50, 1).bfloat16(), torch.arange(50) % 3
    found, wanted = (
        kf.GaussNewtonOperator(model, kf.Categorical(), (inputs, y)).diagonal(300, torch.Generator().manual_seed(0))
        for model, inputs in ((net, x), (copy.deepcopy(net).double(), x.double()))
    )
    assert relative(flat(found).double(), flat(wanted)) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_forms_are_differentiable_in_the_vector(kind: type[Any]) -> None:
    """As those of every curvature; they were cut off from it without a word."""
    net = model().train()
    operator = kind(net, kf.Categorical(), list(zip(X.split(12), Y.split(12), strict=True)))
    dense, vector = operator.to_dense(), vector_of(net)
    for tensor in vector.values():
        tensor.requires_grad_()
    form = operator.quadratic_form(vector)
    torch.testing.assert_close(form, flat(vector) @ dense @ flat(vector), rtol=1e-10, atol=1e-12)
    slope = torch.autograd.grad(form, list(vector.values()), create_graph=True)
    joined = torch.cat([part.flatten() for part in slope])
    torch.testing.assert_close(joined, 2 * dense @ flat(vector), rtol=1e-10, atol=1e-12)
    other = draw(len(joined), seed=9)
    second = torch.autograd.grad(joined @ other, list(vector.values()))
    torch.testing.assert_close(
        torch.cat([part.flatten() for part in second]), 2 * dense @ other, rtol=1e-10, atol=1e-12
    )
    with torch.no_grad():
        assert not operator.quadratic_form(vector).requires_grad
    assert not operator.matmul({name: v.detach() for name, v in vector.items()})["0.weight"].requires_grad


def test_products_within_an_autograd_function() -> None:
    """Its forward switches dual numbers off, and the product was zero."""
    net = model().eval()
    operator, vector = kf.GaussNewtonOperator(net, kf.Categorical(), (X, Y)), vector_of(net)

    class Form(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, given: Tensor) -> Tensor:
            return operator.quadratic_form(vector) * given

    found = Form.apply(torch.ones((), dtype=torch.float64, requires_grad=True))
    torch.testing.assert_close(found.detach(), operator.quadratic_form(vector), rtol=1e-12, atol=0)
