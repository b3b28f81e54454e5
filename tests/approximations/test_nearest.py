"""The nearest Kronecker product, against singular value decompositions and against K-FAC."""

from __future__ import annotations

import pytest
import torch
from tests.blocks.block_cases import random_psd, random_tensor
from tests.exactness_helpers import double, draw, relative
from torch import Tensor, nn

import kronfac as kf
from kronfac.approximations.nearest import nearest_kronecker
from kronfac.blocks import Kronecker

D_OUT, D_IN = 3, 4
SIZE = D_OUT * D_IN


def fitted(matrix: Tensor) -> Tensor:
    found = nearest_kronecker(matrix, D_OUT, D_IN)
    return torch.einsum("...op,...ij->...oipj", found.output, found.input).reshape(matrix.shape)


def singular_values(matrix: Tensor) -> Tensor:
    """Of the rearranged matrix, entry by entry."""
    rows = [matrix[o * D_IN :][:D_IN, p * D_IN :][:, :D_IN].flatten() for o in range(D_OUT) for p in range(D_OUT)]
    return torch.linalg.svdvals(torch.stack(rows))


@pytest.mark.parametrize("rank", [None, 1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_no_kronecker_product_is_nearer(seed: int, rank: int | None) -> None:
    """Eckart & Young: the least distance is the norm of the singular values but the first."""
    matrix = random_psd(SIZE, SIZE, seed=seed, rank=rank)
    values = singular_values(matrix)
    found = nearest_kronecker(matrix, D_OUT, D_IN)
    distance = float((fitted(matrix) - matrix).norm())
    assert distance == pytest.approx(float(values[1:].norm()), rel=1e-10)
    assert float(found.norm) == pytest.approx(float(values[0]), rel=1e-12)
    for factor in (found.input, found.output):
        assert torch.equal(factor, factor.mT)
        assert float(torch.linalg.eigvalsh(factor)[0]) > -1e-12 * float(factor.norm())
        assert float(factor.norm()) == pytest.approx(float(values[0]) ** 0.5, rel=1e-10)


def test_a_kronecker_product_is_its_own_fit() -> None:
    input, output = random_psd(2, D_IN, D_IN, seed=1), random_psd(2, D_OUT, D_OUT, seed=2)
    matrix = torch.einsum("...op,...ij->...oipj", output, input).reshape(2, SIZE, SIZE)
    assert relative(fitted(matrix), matrix) < 1e-13


def test_stack_elements_are_fitted_apart_and_zero_stays_zero() -> None:
    matrix = torch.stack([random_psd(SIZE, SIZE, seed=1), torch.zeros(SIZE, SIZE).double()])
    both = fitted(matrix)
    torch.testing.assert_close(both[0], fitted(matrix[0]), rtol=1e-12, atol=1e-14)
    assert not both[1].any()


def test_equal_singular_values_still_give_a_nearest_product() -> None:
    """Two products of equal norm and nothing in common: either of them, or a mixture, is at the least distance."""
    first = torch.diag(torch.tensor([1.0, 0, 0])).double(), torch.diag(torch.tensor([1.0, 0, 0, 0])).double()
    second = torch.diag(torch.tensor([0, 1.0, 0])).double(), torch.diag(torch.tensor([0, 0, 1.0, 0])).double()
    matrix = torch.kron(*first) + torch.kron(*second)
    assert float((fitted(matrix) - matrix).norm()) == pytest.approx(1.0, rel=1e-12)


def models() -> list[tuple[nn.Module, Tensor]]:
    return [
        (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), draw(7, 3)),
        (nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)), draw(7, 2, 5)),
        (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)), draw(7, 3)),
    ]


@pytest.mark.parametrize("index", range(3))
def test_never_further_from_the_exact_block_than_kfac(index: int) -> None:
    model, x = models()[index]
    model, data = double(model), (x, None)
    found, exact, kfac = (
        kf.estimate(model, kf.Categorical(), data, approximation=name, source="exact").blocks
        for name in ("nearest_kronecker", "dense", "kfac")
    )
    nearer = []
    for name, block in found.items():
        assert isinstance(block, Kronecker)
        wanted = exact[name].to_dense()
        distances = [float((b.to_dense() - wanted).norm()) for b in (block, kfac[name])]
        assert distances[0] <= distances[1] * (1 + 1e-12) + 1e-14
        nearer.append(distances[0] < 0.99 * distances[1])
        # The projection onto a line: what is left over is orthogonal to it.
        assert abs(float(block.inner(exact[name]) - block.frobenius_norm() ** 2)) < 1e-10 * float(wanted.norm()) ** 2
    assert any(nearer)


def test_equal_to_kfac_where_that_is_exact() -> None:
    model = double(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    found, wanted = (
        kf.estimate(model, kf.Gaussian(), (draw(7, 3), None), approximation=name, source="exact").to_dense()
        for name in ("nearest_kronecker", "dense")
    )
    assert relative(found, wanted) < 1e-12


def test_it_inverts_and_saves_as_any_kronecker_block() -> None:
    model = double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    curvature = kf.estimate(model, kf.Categorical(), (draw(7, 3), None), approximation="nearest_kronecker")
    inverse = curvature.factorise(0.1, rule="exact")
    vector = {name: random_tensor(*shape, seed=3) for name, shape in curvature.parameter_shapes.items()}
    solved = inverse.apply(vector)
    back = {name: part + 0.1 * solved[name] for name, part in curvature.matmul(solved).items()}
    for name, part in vector.items():
        torch.testing.assert_close(back[name], part, rtol=1e-10, atol=1e-10)


def test_large_layers_and_unpaired_sources_are_refused() -> None:
    large = nn.Linear(200, 100)
    with pytest.raises(ValueError, match=r"layer '' needs 20100×20100 entries.*use approximation='kfac'"):
        kf.estimate(large, kf.Gaussian(), (torch.zeros(2, 200), None), approximation="nearest_kronecker")
    with pytest.raises(ValueError, match=r"'nearest_kronecker' needs paired statistics"):
        kf.estimate(
            nn.Linear(2, 2),
            kf.Gaussian(),
            (torch.zeros(2, 2), None),
            approximation="nearest_kronecker",
            source="forward_only",
        )


def test_coverage_counts_the_exact_block() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1, bias=False))
    rows = kf.coverage(model, approximation="nearest_kronecker").rows
    assert [row.block for row in rows] == ["kronecker"] * 3
    assert [row.factor_bytes for row in rows] == [4 * 16**2, 0, 4 * 4**2]
    assert [row.state for row in rows] == ["approximate", "approximate", "exact"]
