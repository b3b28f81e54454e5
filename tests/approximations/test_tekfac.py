"""TEKFAC: TKFAC's eigenvectors, the exact diagonal in them, and so never farther from the exact block than TKFAC."""

from __future__ import annotations

import pytest
import torch
from tests.approximations.test_ekfac import NETS, exact_parts, off_diagonal, vectors
from tests.exactness_helpers import block_errors, double, draw, relative, seeded

import kronfac as kf
from kronfac.blocks import EigenKronecker
from kronfac.layers import LayerAdapter


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["mlp", "convolutions", "groups", "sequences"])
def test_the_exact_diagonal_in_the_basis_of_tkfac(name: str, seed: int) -> None:
    make, shape = NETS[name]
    model = double(make(), seed=seed, scale=1.0)
    x, y = draw(*shape, seed=seed + 20), torch.randint(3, shape[:1], generator=seeded(seed))
    exact = kf.reference.ggn(model, kf.Categorical(), x, y)
    found, plain = (
        kf.estimate(model, kf.Categorical(), (x, y), source="exact", approximation=kind) for kind in ("tekfac", "tkfac")
    )
    for layer, block in found.blocks.items():
        adapter = found.layouts[layer]
        assert isinstance(block, EigenKronecker)
        assert isinstance(adapter, LayerAdapter)
        q = vectors(block)
        assert off_diagonal(q.mT @ plain.blocks[layer].matrices() @ q) < 1e-10
        diagonal = (q.mT @ exact_parts(model, adapter, exact) @ q).diagonal(dim1=-2, dim2=-1)
        assert relative(block.values.flatten(-2), diagonal) < 1e-10
    errors, others = block_errors(found, model, exact), block_errors(plain, model, exact)
    assert all(errors[layer] <= others[layer] * (1 + 1e-12) for layer in others)
    assert sum(errors.values()) < 0.99 * sum(others.values())


def test_it_trains_and_resumes_with_the_optimiser() -> None:
    states = []
    for stops in ((), (3,)):
        model = double(NETS["mlp"][0]())
        optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.05, damping=0.1, approximation="tekfac", stats_every=2)
        for step in range(6):
            if step in stops:
                state, optimizer = (
                    optimizer.state_dict(),
                    kf.optim.KFAC(model, kf.Categorical(), lr=0.05, damping=0.1, approximation="tekfac", stats_every=2),
                )
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(draw(9, 4, seed=step)), torch.arange(9) % 3).backward()
            optimizer.step()
        states.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    assert torch.equal(*states)
