"""What curvature must not lose without a word: gradients, random states, and the other processes of a run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.exactness_helpers import double, draw
from torch import Tensor, nn

import kronfac as kf

LABELS = torch.arange(12) % 3


def mlp(dropout: float = 0.0) -> nn.Module:
    return double(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3)))


def curvature(approximation: str) -> kf.Curvature:
    return kf.estimate(mlp(), kf.Categorical(), (draw(12, 4), LABELS), approximation=approximation)


# ---------------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("approximation", ["kfac", "kkfac", "kfac_tridiagonal"])
def test_a_damping_that_wants_a_gradient_is_refused(approximation: str) -> None:
    """A marginal likelihood would be optimised without its log-determinant."""
    found = curvature(approximation)
    damping = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(TypeError, match=r"damping=0\.5.* is a tensor that requires a gradient"):
        found.factorise(damping)  # type: ignore[arg-type]
    with torch.no_grad():
        found.factorise(damping)  # type: ignore[arg-type]
    found.factorise(damping.detach())  # type: ignore[arg-type]


@pytest.mark.parametrize("approximation", ["kfac", "tkfac", "dense", "kkfac", "kfac_tridiagonal"])
def test_inverses_that_would_lose_the_gradient_of_a_scale_are_refused(approximation: str) -> None:
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    scaled = curvature(approximation).scale(scale)
    assert scaled.trace().requires_grad
    with pytest.raises(TypeError, match=r"block of layer '0' depends on a tensor that requires a gradient"):
        scaled.factorise(0.1)
    with torch.no_grad():
        scaled.factorise(0.1)


@pytest.mark.parametrize("approximation", ["diagonal", "ekfac"])
def test_inverses_that_keep_the_gradient_of_a_scale_have_it(approximation: str) -> None:
    found, scale = curvature(approximation), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(found.scale(scale).factorise(0.1).logdet(), scale)
    above, below = (found.scale(2.0 + step).factorise(0.1).logdet() for step in (1e-5, -1e-5))
    assert float(slope) == pytest.approx(float(above - below) / 2e-5, rel=1e-6)


# ---------------------------------------------------------------------------------------------------- random states
@pytest.mark.parametrize("approximation", ["kfac", "ekfac"])
def test_dropout_is_the_seed_s_business(approximation: str) -> None:
    model = mlp(0.5).train()

    def generate() -> Iterator[tuple[Tensor, Tensor]]:
        for seed in range(2):
            torch.rand(3)  # data have a random state of their own
            yield draw(12, 4, seed=seed), LABELS

    found, states = [], []
    for start, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(start)
        options = {"approximation": approximation, "source": "exact", "seed": seed}
        found.append(kf.estimate(model, kf.Categorical(), list(generate()), **options).to_dense())  # type: ignore[call-overload]
        states.append(torch.get_rng_state())
        torch.manual_seed(start)
        list(generate())
        assert torch.equal(torch.get_rng_state(), states[-1])
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_batches_have_masks_of_their_own() -> None:
    model, x = mlp(0.5).train(), draw(12, 4)
    whole, twice = (
        kf.estimate(model, kf.Categorical(), data, approximation="dense", source="exact").to_dense()
        for data in ((x, LABELS), [(x, LABELS)] * 2)
    )
    assert not torch.allclose(whole, twice)


# ---------------------------------------------------------------------------------------------------- processes
class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(4, 5), nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])

    def forward(self, x: Tensor, head: int) -> Tensor:
        out: Tensor = self.heads[head](self.body(x).tanh())
        return out


@pytest.mark.parametrize("elsewhere", [True, False])
def test_all_processes_refuse_a_layer_that_one_of_them_lacks(monkeypatch: pytest.MonkeyPatch, elsewhere: bool) -> None:
    """The one that raised left the others waiting for its part of the sums."""
    reduced = []

    def all_reduce(tensor: Tensor, op: object) -> None:
        assert op is torch.distributed.ReduceOp.MAX
        reduced.append(tensor.clone())
        if elsewhere and len(reduced) == 2:  # the other process has statistics of all layers
            tensor.fill_(1)

    model = double(Heads())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    text = r"called layers \['heads.1'\], those of others never" if elsewhere else r"No statistics for layers"
    with pytest.raises(RuntimeError, match=text):
        kf.estimate(model, kf.Categorical(), [((draw(12, 4), 0), LABELS)])
    assert [tensor.tolist() for tensor in reduced] == [[0, 0, 0], [1, 1, 0], [0, 0, 1]]
