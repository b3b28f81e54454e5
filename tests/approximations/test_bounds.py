"""Theorem 4.4 of Gao et al. 2020, corrected, and the bound of KFAC's error, over random draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.exactness_helpers import draw
from torch import Tensor

from kronfac.approximations.bounds import kfac_error_bound, tkfac_error_bound


def blocks(a: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exact block, TKFAC's and KFAC's, by their formulas."""
    inputs, outputs = torch.einsum("ni,nj->nij", a, a), torch.einsum("ni,nj->nij", u, u)
    exact = torch.stack([torch.kron(x, y) for x, y in zip(inputs, outputs, strict=True)]).mean(0)
    p, q = a.square().sum(1)[:, None, None], u.square().sum(1)[:, None, None]
    delta = (p * q).mean()
    tkfac = torch.kron((q * inputs).mean(0), (p * outputs).mean(0)) / delta
    return exact, tkfac, torch.kron(inputs.mean(0), outputs.mean(0))


@settings(max_examples=3000, deadline=None, derandomize=True, database=None)
@given(
    count=st.integers(1, 6),
    d_in=st.integers(1, 4),
    d_out=st.integers(1, 3),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
    sparse=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_errors_are_within_their_bounds(
    count: int, d_in: int, d_out: int, spread: float, sparse: bool, seed: int
) -> None:
    """Rows of similar and of very different norms, dense and along single axes."""
    a, u = draw(count, d_in, seed=seed), draw(count, d_out, seed=seed + 1)
    if sparse:
        a, u = (t * torch.nn.functional.one_hot(t.abs().argmax(1), t.shape[1]) for t in (a, u))
    a = a * (spread * draw(count, 1, seed=seed + 2)).exp()
    u = u * (spread * draw(count, 1, seed=seed + 3)).exp()
    exact, tkfac, kfac = blocks(a, u)
    slack = 1e-9 * float(torch.linalg.matrix_norm(exact))
    assert float(torch.linalg.matrix_norm(exact - tkfac)) <= float(tkfac_error_bound(a, u)) + slack
    assert float(torch.linalg.matrix_norm(exact - kfac)) <= float(kfac_error_bound(a, u)) + slack * (
        1 + float(torch.linalg.matrix_norm(kfac) / torch.linalg.matrix_norm(exact))
    )
    # For every pair the geometric mean is below the product of arithmetic means.
    assert float(tkfac_error_bound(a, u)) <= float(kfac_error_bound(a, u)) * (1 + 1e-12)


def test_both_bounds_are_attained() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    exact, tkfac, _ = blocks(eye, eye)
    assert float(torch.linalg.matrix_norm(exact - tkfac)) == pytest.approx(float(tkfac_error_bound(eye, eye)))
    a, u = torch.tensor([[2.0], [1e-9]]).double(), torch.tensor([[1e-9], [3.0]]).double()
    exact, _, kfac = blocks(a, u)
    assert float(torch.linalg.matrix_norm(exact - kfac)) == pytest.approx(float(kfac_error_bound(a, u)))


def test_bounds_are_those_of_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    a, u = draw(7, 3), draw(7, 2, seed=1)
    pairs = [(i, j) for i in range(7) for j in range(i)]
    p, q = a.square().sum(1), u.square().sum(1)
    tkfac = 6 / 7 * max(float((p[i] * p[j] * q[i] * q[j]).sqrt()) for i, j in pairs)
    kfac = 6 / 14 * max(float((p[i] + p[j]) * (q[i] + q[j])) for i, j in pairs)
    assert float(tkfac_error_bound(a, u)) == pytest.approx(tkfac)
    for at_once in (1, 15, 1 << 22):
        monkeypatch.setattr("kronfac.approximations.bounds._PAIRS", at_once)
        assert float(kfac_error_bound(a, u)) == pytest.approx(kfac)


@pytest.mark.parametrize("bound", [tkfac_error_bound, kfac_error_bound])
def test_one_example_and_bad_input(bound) -> None:  # type: ignore[no-untyped-def]
    assert float(bound(draw(1, 3), draw(1, 2))) == 0.0
    with pytest.raises(ValueError, match=r"\[N, d_in\].*got \(3, 2\), \(4, 2\)"):
        bound(draw(3, 2), draw(4, 2))
    with pytest.raises(TypeError, match="share a floating-point dtype"):
        bound(draw(3, 2), draw(3, 2).float())
