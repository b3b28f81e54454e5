"""Inverses in matrix products are Cholesky's, and what is no inverse is said to be none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kronfac.linalg import by_products
from kronfac.linalg.by_products import BLOCK, invert_by_products_, invert_triangles_, square_triangles_


def random_pd(*shape: int, smallest: float = 0.1) -> Tensor:
    """Positive definite, with eigenvalues from one down to the smallest in equal ratios."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=torch.float64))[0]
    return basis * torch.logspace(0, torch.tensor(smallest).log10().item(), shape[-1]) @ basis.mT


@pytest.fixture(params=[100, by_products.WHOLE], autouse=True)
def _whole(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices by one call, as they are, and by halves."""
    monkeypatch.setattr(by_products, "WHOLE", request.param)


@pytest.mark.parametrize("n", [1, 9, 2 * BLOCK, 2 * BLOCK + 1, 300, 577, 1100])
def test_the_inverses_are_right(n: int) -> None:
    """One of four not positive definite: named by the mask, the others right."""
    matrices = random_pd(4, n, n)
    matrices[2] -= 0.5 * torch.eye(n)
    if n == 1:
        matrices[2] -= 1
    work = matrices.clone()
    work[:, torch.ones(n, n).tril(-1).bool()] = 7.0  # the upper triangles alone are read
    logdets, good = invert_by_products_(work)
    assert good.tolist() == [True, True, False, True]
    for index in (0, 1, 3):
        torch.testing.assert_close(work[index], torch.linalg.inv(matrices[index]), rtol=1e-11, atol=1e-11)
        assert torch.equal(work[index], work[index].mT)
        torch.testing.assert_close(logdets[index], torch.logdet(matrices[index]))


@pytest.mark.parametrize("smallest", [1e-1, 1e-3, 1e-5])
def test_float32_is_as_near_as_cholesky(smallest: float) -> None:
    exact = random_pd(400, 400, smallest=smallest)
    matrix = exact.float()
    wanted = torch.linalg.inv(matrix.double())
    work = matrix[None].clone()
    assert invert_by_products_(work)[1]
    cholesky = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    errors = [torch.linalg.norm(found.double() - wanted) for found in (work[0], cholesky)]
    assert errors[0] < 2 * errors[1]


@pytest.mark.parametrize("n", [128, 192, 320, 448, 960])
def test_triangles(n: int) -> None:
    """Every number of blocks, odd ones at several levels too; and squares by halves."""
    generator = torch.Generator().manual_seed(n)
    triangles = torch.randn(3, n, n, generator=generator, dtype=torch.float64).tril_(-1) / n + torch.eye(n)
    inverses = invert_triangles_(triangles.clone())
    torch.testing.assert_close(inverses, torch.linalg.inv(triangles).tril(), rtol=1e-12, atol=1e-12)
    squares = square_triangles_(inverses.clone()).triu()
    torch.testing.assert_close(squares, (inverses.mT @ inverses).triu(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_never_pass(value: float) -> None:
    work = torch.eye(300).expand(2, 300, 300).clone()
    work[1, 290, 3] = work[1, 3, 290] = value
    assert invert_by_products_(work)[1].tolist() == [True, False]
