"""Symmetric products by panels against plain products."""

from __future__ import annotations

import pytest
import torch
from tests.exactness_helpers import draw

from kronfac.linalg import symmetric
from kronfac.linalg.symmetric import PANEL, add_gram_, add_product_, all_finite, mirror_, row_step, with_even_rows

WIDTHS = [1, 5, PANEL - 1, PANEL, 2 * PANEL - 1, 2 * PANEL, 2 * PANEL + 1, 3 * PANEL + 77]


def test_finite_numbers_of_several_tensors() -> None:
    assert all_finite()
    large = torch.full((3,), torch.finfo(torch.float32).max)
    assert all_finite(torch.ones(2), large, torch.ones(2, dtype=torch.float64))  # their sum overflows
    for value in (torch.nan, torch.inf, -torch.inf):
        for place in range(3):
            tensors = [torch.ones(4) for _ in range(3)]
            tensors[place][2] = value
            assert not all_finite(*tensors)


@pytest.mark.parametrize("width", WIDTHS)
def test_gram_is_the_product_after_mirroring(width: int) -> None:
    rows, start = draw(9, width), draw(width, width, seed=1)
    start = start + start.T
    weights = draw(9, seed=2).square()
    plain = mirror_(add_gram_(start.clone(), rows, alpha=0.5))
    torch.testing.assert_close(plain, start + 0.5 * rows.T @ rows, rtol=1e-12, atol=1e-12)
    weighted = mirror_(add_gram_(start.clone(), rows, weights=weights, alpha=2.0))
    torch.testing.assert_close(weighted, start + 2 * rows.T @ (weights[:, None] * rows), rtol=1e-12, atol=1e-12)


def test_wide_products_write_the_upper_triangle_only() -> None:
    """About half of the flops: below the panels on the diagonal nothing is touched."""
    width = 3 * PANEL
    below = torch.ones(width, width, dtype=torch.bool).tril(-PANEL)
    total = torch.zeros(width, width, dtype=torch.float64).masked_fill(below, torch.nan)
    add_gram_(total, draw(4, width))
    assert total[below].isnan().all()
    assert total.triu().isfinite().all()
    assert mirror_(total).isfinite().all()


def test_stacks_and_strided_totals() -> None:
    rows, start = draw(3, 8, 5), draw(3, 5, 5, seed=1)
    start = start + start.mT
    torch.testing.assert_close(mirror_(add_gram_(start.clone(), rows)), start + rows.mT @ rows)
    for width in (5, 2 * PANEL + 3):
        total = torch.zeros(width + 1, width + 1, dtype=torch.float64)
        flat = draw(6, width)
        add_gram_(total[:-1, :-1], flat)
        torch.testing.assert_close(mirror_(total[:-1, :-1]), flat.T @ flat)
        assert not total[-1].any()
        assert not total[:, -1].any()


@pytest.mark.parametrize("shape", [(4, 3, 2), (5, 2 * PANEL, 2 * PANEL + 1)])
def test_products_that_are_not_symmetric_are_whole(shape: tuple[int, int, int]) -> None:
    left, right = draw(shape[0], shape[1]), draw(shape[0], shape[2], seed=1)
    total = torch.ones(shape[1], shape[2], dtype=torch.float64)
    torch.testing.assert_close(add_product_(total, left, right, alpha=-3.0), 1 - 3 * left.T @ right)


@pytest.mark.parametrize("width", WIDTHS)
def test_mirror_copies_the_upper_triangle(width: int) -> None:
    matrix = draw(2, width, width)
    wanted = matrix.triu() + matrix.triu(1).mT
    found = mirror_(matrix)
    assert found is matrix
    assert torch.equal(found, wanted)


def test_all_finite_is_not_fooled_by_an_overflowing_sum() -> None:
    large = torch.full((4,), 3e38)
    assert torch.isinf(large.sum())
    assert all_finite(large)
    assert not all_finite(torch.tensor([1.0, torch.nan]))
    assert not all_finite(torch.tensor([torch.inf, -torch.inf]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_even_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetric, "outruns_mkl", lambda: False)  # where oneDNN multiplies, they do not pay
    matrix = torch.randn(251, 251, dtype=dtype)
    even = with_even_rows(matrix)
    assert torch.equal(even, matrix)
    assert even.stride(0) * even.element_size() % 64 == 0
    assert with_even_rows(even) is even
    assert with_even_rows(matrix[:50, :50]).stride() == matrix[:50, :50].stride()
    assert row_step(1024, torch.float32) == 1040


@pytest.mark.parametrize(("m", "n"), [(2, 2), (4, 4), (8, 8), (9, 9), (2, 65), (64, 3)])
@pytest.mark.parametrize("rows", [1, 5000, 100_000])
def test_few_columns_of_many_rows_are_added_up_to_rounding(m: int, n: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(rows, width, generator=generator) + 1 for width in (m, n))
    total = torch.ones(m, n)
    add_product_(total, left, right, alpha=0.5)
    wanted = 1 + 0.5 * left.double().T @ right.double()
    assert float((total - wanted).abs().max() / wanted.abs().max()) < 1e-6
