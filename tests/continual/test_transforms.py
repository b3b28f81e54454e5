"""Penalties under the transforms of torch.func: ensembles, forward derivatives, Hessians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jvp, vmap

import kronfac as kf
from kronfac.continual import QuadraticPenalty


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward derivatives use it
@pytest.mark.parametrize("approximation", ["kfac", "ekfac", "diagonal", "kfac_tridiagonal"])
def test_penalties_are_transformed_as_the_dense_form(approximation: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    pair = torch.randn(9, 4, dtype=torch.float64), torch.randint(0, 2, (9,))
    curvature = kf.estimate(model, kf.Categorical(), pair, approximation=approximation)
    term = QuadraticPenalty(curvature, strength=3.0)
    penalty, dense = term + term, 6.0 * curvature.to_dense()
    start = torch.cat([p.detach().flatten() for p in model.parameters()])

    def value(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in curvature.parameter_shapes.values()])
        shapes = curvature.parameter_shapes.items()
        return penalty({name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)})

    several, direction = torch.randn(3, len(start), dtype=torch.float64), torch.randn_like(start)
    delta = several - start
    close = torch.testing.assert_close
    close(vmap(value)(several), 0.5 * ((delta @ dense) * delta).sum(-1))
    close(vmap(grad(value))(several), delta @ dense)
    close(jvp(value, (several[0],), (direction,))[1], delta[0] @ dense @ direction)
    close(hessian(value)(several[0]), dense, rtol=1e-9, atol=1e-12)
    close(jacfwd(jacfwd(value))(several[0]), dense, rtol=1e-9, atol=1e-12)
