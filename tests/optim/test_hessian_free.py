"""``HessianFree`` against dense solves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.exactness_helpers import draw
from tests.optim.hand_kfac import network
from torch import nn
from torch.nn import functional as F

import kronfac as kf

LABELS = torch.arange(24) % 3


def flat(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


@pytest.mark.parametrize("block_diagonal", [False, True])
@pytest.mark.parametrize("precondition", [False, True])
def test_the_first_step_is_the_dense_solution(precondition: bool, block_diagonal: bool) -> None:
    model, x = network(), draw(24, 3)
    matrix = kf.reference.ggn(model, kf.Categorical(), x)
    loss = F.cross_entropy(model(x), LABELS)
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    kept = torch.zeros_like(matrix)
    start = 0
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model if isinstance(layer, nn.Linear)]
    for size in sizes if block_diagonal else [len(matrix)]:
        kept[start : start + size, start : start + size] = matrix[start : start + size, start : start + size]
        start += size
    lam, decay = 0.3, 0.01
    theta = flat(model)
    identity = torch.eye(len(matrix), dtype=torch.float64)
    delta = -torch.linalg.solve(kept + (lam + decay) * identity, slope + decay * theta)
    full = matrix + (lam + decay) * identity
    wanted = delta * -float((slope + decay * theta) @ delta) / float(delta @ full @ delta)
    optimizer = kf.optim.HessianFree(
        model,
        kf.Categorical(),
        damping=lam,
        weight_decay=decay,
        precondition=precondition,
        block_diagonal=block_diagonal,
        tolerance=1e-12,
        progress=1e-15,
        max_iterations=500,
    )
    optimizer.step(lambda: F.cross_entropy(model(x), LABELS))
    torch.testing.assert_close(flat(model) - theta, wanted, rtol=1e-8, atol=1e-10)
    assert optimizer.iterations > 0


@pytest.mark.parametrize("options", [{}, {"precondition": False, "damping": 1.0}, {"block_diagonal": True}])
def test_it_trains_and_resumes(options: dict[str, Any]) -> None:
    def make() -> tuple[nn.Module, kf.optim.HessianFree]:
        model = network()
        return model, kf.optim.HessianFree(model, kf.Categorical(), **options)

    x = draw(24, 3)
    model, optimizer = make()
    first = [float(optimizer.step(lambda: F.cross_entropy(model(x), LABELS))) for _ in range(6)]
    state, parameters = optimizer.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    other, again = make()
    other.load_state_dict(parameters)
    again.load_state_dict(state)
    wanted = [float(optimizer.step(lambda: F.cross_entropy(model(x), LABELS))) for _ in range(5)]
    assert [float(again.step(lambda: F.cross_entropy(other(x), LABELS))) for _ in range(5)] == wanted
    assert wanted[-1] < 0.6 * first[0]


def test_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(TypeError, match="momentum"):
        kf.optim.HessianFree(network(), kf.Categorical(), momentum=True)
    with pytest.raises(ValueError, match="precondition"):
        kf.optim.HessianFree(network(), kf.Categorical(), precondition=False)
    with pytest.raises(ValueError, match="max_iterations"):
        kf.optim.HessianFree(network(), kf.Categorical(), max_iterations=0)
