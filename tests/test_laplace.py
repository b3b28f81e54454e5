"""A Laplace approximation by the public face: for a linear model it is Bayesian linear regression."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap

import kronfac as kf

NOISE, PRIOR = 0.3, 2.0


@pytest.fixture
def fitted() -> tuple[nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The most probable weights, inputs, targets, and inputs with a one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    y = x.sum(1, keepdim=True) + 0.5 + NOISE * torch.randn(40, 1, generator=generator, dtype=torch.float64)
    rows = torch.cat((x, torch.ones_like(y)), 1)
    precision = rows.T @ rows / NOISE**2 + PRIOR * torch.eye(4, dtype=torch.float64)
    weights = torch.linalg.solve(precision, rows.T @ y / NOISE**2)
    model = nn.Linear(3, 1).double()
    with torch.no_grad():
        model.weight.copy_(weights[:3].T)
        model.bias.copy_(weights[3])
    return model, x, y, rows


@pytest.mark.parametrize("approximation", ["kfac", "ekfac", "dense"])
def test_evidence_variances_and_samples_are_those_of_bayesian_linear_regression(
    fitted: tuple[nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor], approximation: str
) -> None:
    model, x, y, rows = fitted
    likelihood = kf.Gaussian(variance=NOISE**2, reduction="sum")
    curvature = kf.estimate(model, likelihood, (x, y), approximation=approximation, source="exact", progress=False)
    posterior = curvature.factorise(PRIOR, rule="exact")
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    squares = sum(p.square().sum() for p in parameters.values())
    with torch.no_grad():
        constant = 0.5 * len(x) * math.log(2 * math.pi * NOISE**2)
        evidence = -likelihood.loss(model(x), y) - constant
    evidence = evidence - 0.5 * (posterior.logdet() - 4 * math.log(PRIOR) + PRIOR * squares)
    marginal = rows @ rows.T / PRIOR + NOISE**2 * torch.eye(40, dtype=torch.float64)
    wanted = torch.distributions.MultivariateNormal(torch.zeros(40, dtype=torch.float64), marginal).log_prob(y[:, 0])
    torch.testing.assert_close(evidence, wanted, rtol=1e-10, atol=0)

    covariance = torch.linalg.inv(rows.T @ rows / NOISE**2 + PRIOR * torch.eye(4, dtype=torch.float64))
    jacobians = jacrev(lambda p: functional_call(model, p, (x,)))(parameters)
    images = vmap(vmap(posterior.apply))(jacobians)
    variances = sum((jacobians[name] * images[name]).flatten(2).sum(2) for name in jacobians)
    torch.testing.assert_close(variances[:, 0], ((rows @ covariance) * rows).sum(1), rtol=1e-10, atol=0)

    units = torch.eye(4, dtype=torch.float64)
    root = vmap(posterior.sqrt_apply)({"weight": units[:, None, :3], "bias": units[:, 3:]})
    columns = torch.cat((root["weight"][:, 0], root["bias"]), 1).T
    torch.testing.assert_close(columns @ columns.T, covariance, rtol=1e-10, atol=1e-14)
