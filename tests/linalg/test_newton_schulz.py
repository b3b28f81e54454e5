"""Inverses from approximate ones: right to the tolerance, or Cholesky's to the last bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.blocks.block_cases import cholesky_inverses, random_psd
from torch import Tensor

from kronfac.linalg import newton_schulz
from kronfac.linalg.closeness import reach, rms_residual
from kronfac.linalg.factorise import retries
from kronfac.linalg.newton_schulz import TOLERANCE, renew


def conditioned(n: int, condition: float, seed: int = 0) -> Tensor:
    """Symmetric, eigenvalues from 1 down to the reciprocal of the condition number."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)
    product = (basis * values) @ basis.T
    return (product + product.T) / 2


def moved(matrix: Tensor, by: float, seed: int = 1) -> Tensor:
    """The running average one batch later: ``(1 - by) M`` and ``by`` of a sample covariance whose mean is ``M``."""
    n = matrix.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*matrix.shape[:-2], 4 * n, n, generator=generator, dtype=torch.float64)
    rows = rows @ torch.linalg.cholesky(matrix.double()).mT
    return ((1 - by) * matrix.double() + by * rows.mT @ rows / (4 * n)).to(matrix.dtype)


def eye(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype)


def error(found: Tensor, matrix: Tensor) -> float:
    exact = torch.linalg.inv(matrix.double())
    return float(torch.linalg.norm(found.double() - exact) / torch.linalg.norm(exact))


def check(found: Tensor, matrix: Tensor, bound: float) -> None:
    assert torch.equal(found, found.mT)
    for one, other in zip(
        found.flatten(0, -3) if found.ndim > 2 else [found], matrix.reshape(-1, *matrix.shape[-2:]), strict=True
    ):
        assert error(one, other) < bound
        assert float(torch.linalg.norm(eye(other).double() - other.double() @ one.double())) < 10 * bound * len(one)


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e6])
@pytest.mark.parametrize("by", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("n", [1, 2, 33, 250])
def test_float64_against_the_exact_inverse(n: int, by: float, condition: float) -> None:
    old = conditioned(n, condition)
    new = moved(old, by)
    (found,) = renew([new], [0.0], [torch.linalg.inv(old).add_(torch.linalg.inv(old).T).div_(2)])
    check(found.inverse, new, 1e-8)
    if condition <= 1e2:
        assert not found.fallback
    if by and n > 2:
        assert found.fallback == (condition > 1e5)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e4])
@pytest.mark.parametrize("n", [33, 250])
def test_float32_is_as_good_as_cholesky(n: int, condition: float) -> None:
    old = conditioned(n, condition).float()
    new = moved(old, 0.1)
    with retries() as again:
        (found,) = renew([new], [0.0], cholesky_inverses([old], [0.0]))
    assert found.inverse.dtype == torch.float32
    assert not found.fallback
    assert found.iterations >= 1
    assert not again
    assert rms_residual(new[None].double(), found.inverse[None].double())[0] <= 2 * TOLERANCE[torch.float32]
    assert error(found.inverse, new) < 1e-4


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    exponent=st.floats(0.0, 7.0),
    by=st.floats(0.0, 1.0),
    shift=st.floats(0.0, 1.0),
    old_shift=st.floats(0.0, 1.0),
    scale=st.floats(1e-3, 1e3),
    double=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_whatever_the_start_the_inverse_is_one(
    n: int, exponent: float, by: float, shift: float, old_shift: float, scale: float, double: bool, seed: int
) -> None:
    """Errors stay at what rounding makes of the condition number, wherever the start is."""
    old = conditioned(n, 10.0**exponent, seed)
    new = scale * moved(old, by, seed + 1)
    dtype = torch.float64 if double else torch.float32
    start = torch.linalg.inv(old + old_shift * eye(old))
    (found,) = renew([new.to(dtype)], [shift], [((start + start.T) / 2).to(dtype)])
    damped = new.to(dtype).double() + shift * eye(new)
    assert torch.equal(found.inverse, found.inverse.mT)
    unit, slack = torch.finfo(dtype).eps, 4 * TOLERANCE[dtype] * n**0.5
    assert error(found.inverse, damped) < slack + 100 * unit * float(torch.linalg.cond(damped))


def test_many_shapes_in_one_call_each_with_a_shift_of_its_own() -> None:
    shapes = [(3, 3), (40, 40), (3, 3), (2, 3, 3), (40, 40), (2, 3, 3), (250, 250), (2, 2, 50, 50), (3, 3)]
    olds = [
        random_psd(*shape, seed=i) + eye(torch.empty(shape[-1:] * 2, dtype=torch.float64))
        for i, shape in enumerate(shapes)
    ]
    news = [1.3 * moved(old, 0.05) for old in olds]
    before = [new.clone() for new in news]
    starts: list[Tensor | None] = list(cholesky_inverses(olds, [0.2] * len(olds)))
    kept = [start.clone() for start in starts if start is not None]
    starts[2] = None
    shifts: list[Any] = [0.2 + 0.01 * i for i in range(len(olds))]
    shifts[7] = torch.tensor([[0.2, 0.3], [0.25, 0.21]], dtype=torch.float64)
    for i, result in enumerate(renew(news, shifts, starts)):
        shift = torch.as_tensor(shifts[i], dtype=torch.float64)[..., None, None]
        check(result.inverse, news[i] + shift * eye(news[i]), 1e-9)
        assert result.inverse.shape == news[i].shape
        assert not result.fallback
        assert (result.iterations > 0) == (i != 2)
        assert torch.equal(news[i], before[i])
        if starts[i] is not None:
            assert torch.equal(starts[i], kept[i])  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [5, 60])
def test_a_start_too_far_away_is_cholesky_to_the_last_bit(n: int) -> None:
    matrix = conditioned(n, 100.0)
    far = conditioned(n, 1e4, seed=3)
    near = cholesky_inverses([matrix], [0.11])[0]
    first, second = renew([matrix, matrix], [0.1, 0.1], [far, near])
    assert first.fallback
    assert first.iterations == 0
    assert not second.fallback
    assert torch.equal(first.inverse, cholesky_inverses([matrix], [0.1])[0])
    check(second.inverse, matrix + 0.1 * eye(matrix), 1e-10)


def test_one_element_of_a_stack_that_is_too_far_away_takes_the_stack_along() -> None:
    matrix = torch.stack([conditioned(8, 10.0), conditioned(8, 10.0, seed=1)])
    start = torch.linalg.inv(matrix)
    start[1] = conditioned(8, 1e6, seed=7)
    (found,) = renew([matrix], [0.0], [(start + start.mT) / 2])
    assert found.fallback
    assert torch.equal(found.inverse, cholesky_inverses([matrix], [0.0])[0])


def test_large_groups_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    olds = [conditioned(6, 10.0, seed=i) for i in range(5)]
    news, starts = [moved(old, 0.1) for old in olds], list(cholesky_inverses(olds, [0.1] * 5))
    whole = renew(news, [0.1] * 5, starts)
    monkeypatch.setattr(newton_schulz, "_ENTRIES", 80)
    for one, other in zip(whole, renew(news, [0.1] * 5, starts), strict=True):
        assert not other.fallback
        torch.testing.assert_close(one.inverse, other.inverse, rtol=1e-9, atol=1e-9)


def test_what_is_not_there_in_time_or_stagnates_is_cholesky() -> None:
    old = conditioned(60, 10.0)
    new, start = moved(old, 0.4), cholesky_inverses([old], [0.0])[0]
    wanted = cholesky_inverses([new], [0.0])[0]
    (late,) = renew([new], [0.0], [start], max_iterations=2)
    assert late.fallback
    assert late.iterations <= 2
    assert torch.equal(late.inverse, wanted)
    (never,) = renew([new], [0.0], [start], tolerance=1e-30)
    assert never.fallback
    assert torch.equal(never.inverse, wanted)
    (stuck,) = renew([new], [0.0], [start], tolerance=1e-16, max_iterations=50)
    assert stuck.fallback
    assert stuck.iterations < 10
    assert torch.equal(stuck.inverse, wanted)


def test_a_moved_scale_costs_no_iteration() -> None:
    matrix = conditioned(50, 10.0)
    (found,) = renew([5.0 * matrix], [0.0], [torch.linalg.inv(matrix)])
    assert found.iterations == 1
    check(found.inverse, 5.0 * matrix, 1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [(0, 0), (3, 1), (39, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_and_inf_never_pass(value: float, place: tuple[int, int], dtype: torch.dtype) -> None:
    good = random_psd(40, 40, seed=0).to(dtype)
    start = cholesky_inverses([good], [0.1])[0]
    bad = good.clone()
    bad[place] = bad[place[::-1]] = value
    with pytest.raises(torch.linalg.LinAlgError, match=r"the input factor.*contains NaN or Inf"):
        renew([good, bad], [0.1, 0.1], [start, start], ["another", "the input factor"])
    spoilt = start.clone()
    spoilt[place] = spoilt[place[::-1]] = value
    (found,) = renew([good], [0.1], [spoilt])
    assert found.fallback
    assert torch.equal(found.inverse, start)


def test_what_is_not_positive_definite_is_refused_by_name() -> None:
    matrix = conditioned(40, 10.0)
    bad = matrix - 0.5 * eye(matrix)
    with pytest.raises(torch.linalg.LinAlgError, match=r"matrix 0.*larger damping"):
        renew([bad], [0.0], [torch.linalg.inv(matrix)])


def test_bad_arguments() -> None:
    one = torch.eye(2)
    with pytest.raises(ValueError, match="as many shifts and starts"):
        renew([one], [0.1], [])
    with pytest.raises(ValueError, match=r"start of G has shape \(3, 3\)"):
        renew([one], [0.1], [torch.eye(3)], ["G"])
    with pytest.raises(ValueError, match="does not fit its stack"):
        renew([torch.eye(2).expand(3, 2, 2)], [torch.ones(2)], [torch.eye(2).expand(3, 2, 2)])
    with pytest.raises(TypeError, match="bfloat16"):
        renew([one.bfloat16()], [0.1], [None])
    assert renew([], [], []) == []


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_the_spectrum_is_foretold(n: int) -> None:
    matrix = conditioned(n, 3.0)
    (known,) = reach(matrix[None], torch.eye(n, dtype=torch.float64)[None])
    if n == 1:
        assert known.radius == 0.0
    else:
        assert known.radius == pytest.approx(0.5, rel=0.3)
        assert known.radius <= 0.5 + 1e-12
        assert known.scale == pytest.approx(1.5, rel=0.2)


def test_residuals_are_measured() -> None:
    matrix = conditioned(200, 10.0)
    inverse = torch.linalg.inv(matrix + 0.01 * eye(matrix))
    exact = float(torch.linalg.norm(eye(matrix) - matrix @ inverse)) / 200**0.5
    assert rms_residual(matrix[None], inverse[None])[0] == pytest.approx(exact, rel=0.5)
