"""Conjugate gradients against dense solves."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kronfac.linalg.conjugate_gradient import conjugate_gradient


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(n: int, seed: int = 0, shift: float = 1.0) -> Tensor:
    root = draw(n, n, seed=seed)
    return root @ root.T / n + shift * torch.eye(n, dtype=torch.float64)


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 10_000), st.floats(0.05, 10.0))
def test_agrees_with_the_dense_solution(n: int, seed: int, shift: float) -> None:
    matrix, b = positive(n, seed, shift), draw(n, seed=seed + 1)
    # A few iterations beyond n: in floating point the directions are conjugate up to rounding.
    found = conjugate_gradient(lambda v: matrix @ v, b, tolerance=1e-12, max_iterations=n + 8)
    assert found.converged
    assert found.reason == "tolerance"
    assert difference(found.solution, torch.linalg.solve(matrix, b)) < 1e-9
    assert found.residual == pytest.approx(float((b - matrix @ found.solution).norm() / b.norm()), abs=1e-15)
    objectives = [line.objective for line in found.record]
    assert all(after <= before + 1e-12 * abs(before) for before, after in pairwise(objectives))
    optimum = -0.5 * torch.dot(b, torch.linalg.solve(matrix, b))
    assert objectives[-1] == pytest.approx(float(optimum), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 25), st.integers(0, 10_000))
def test_exact_after_n_iterations(n: int, seed: int) -> None:
    # As long as rounding leaves the directions conjugate, which it does for a matrix as well conditioned as this.
    matrix, b = positive(n, seed, 2.0), draw(n, seed=seed + 1)
    found = conjugate_gradient(lambda v: matrix @ v, b, tolerance=1e-15, max_iterations=n)
    assert found.iterations <= n
    assert difference(found.solution, torch.linalg.solve(matrix, b)) < 1e-9


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 25), st.integers(0, 10_000))
def test_preconditioned_by_the_inverse_one_iteration_is_enough(n: int, seed: int) -> None:
    matrix, b = positive(n, seed, 0.01), draw(n, seed=seed + 1)
    inverse = torch.linalg.inv(matrix)
    found = conjugate_gradient(lambda v: matrix @ v, b, preconditioner=lambda r: inverse @ r, tolerance=1e-9)
    assert (found.iterations, found.converged) == (1, True)
    assert difference(found.solution, torch.linalg.solve(matrix, b)) < 1e-9


def test_as_many_iterations_as_there_are_distinct_eigenvalues() -> None:
    basis = torch.linalg.qr(draw(20, 20)).Q
    values = torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64).repeat(7)[:20]
    matrix = basis @ torch.diag(values) @ basis.T
    found = conjugate_gradient(lambda v: matrix @ v, draw(20, seed=1), tolerance=1e-10)
    assert found.iterations == 3
    # One product each, and one to check.
    assert found.products == 4


def test_a_diagonal_preconditioner_saves_iterations_and_leaves_the_solution() -> None:
    scales = torch.logspace(-3, 3, 40, dtype=torch.float64)
    matrix = positive(40) * scales.sqrt().unsqueeze(1) * scales.sqrt()
    b = draw(40, seed=1)
    plain = conjugate_gradient(lambda v: matrix @ v, b, tolerance=1e-10, max_iterations=5000)
    helped = conjugate_gradient(
        lambda v: matrix @ v, b, tolerance=1e-10, max_iterations=5000, preconditioner=lambda r: r / matrix.diagonal()
    )
    assert plain.converged
    assert helped.converged
    assert helped.iterations < plain.iterations / 2
    assert difference(helped.solution, torch.linalg.solve(matrix, b)) < 1e-8


def test_mappings_and_lists_keep_their_form() -> None:
    matrix, b = positive(6), draw(6, seed=1)

    def flat(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1) for part in parts])

    def by_name(v: dict[str, Tensor]) -> dict[str, Tensor]:
        product = matrix @ flat([v["w"], v["b"]])
        return {"b": product[4:], "w": product[:4].view(2, 2)}  # another order is no matter

    found = conjugate_gradient(by_name, {"w": b[:4].view(2, 2), "b": b[4:]}, tolerance=1e-12)
    assert list(found.solution) == ["w", "b"]
    assert found.solution["w"].shape == (2, 2)
    wanted = torch.linalg.solve(matrix, b)
    assert difference(flat(list(found.solution.values())), wanted) < 1e-10

    def by_place(v: list[Tensor]) -> list[Tensor]:
        product = matrix @ flat(v)
        return [product[:4].view(2, 2), product[4:]]

    listed = conjugate_gradient(by_place, [b[:4].view(2, 2), b[4:]], tolerance=1e-12)
    assert difference(flat(listed.solution), wanted) < 1e-10


def test_warm_start() -> None:
    matrix, b = positive(15), draw(15, seed=1)
    solution = torch.linalg.solve(matrix, b)
    near = solution + 1e-6 * draw(15, seed=2)
    cold = conjugate_gradient(lambda v: matrix @ v, b, tolerance=1e-8)
    warm = conjugate_gradient(lambda v: matrix @ v, b, tolerance=1e-8, start=near)
    assert warm.iterations < cold.iterations
    assert difference(warm.solution, solution) < 1e-7
    there = conjugate_gradient(lambda v: matrix @ v, b, tolerance=1e-8, start=solution)
    assert (there.iterations, there.converged, there.products) == (0, True, 1)


def test_iterates_are_observed_and_the_limit_is_said() -> None:
    matrix, b = positive(30, shift=0.001), draw(30, seed=1)
    seen: list[tuple[int, Tensor]] = []
    found = conjugate_gradient(
        lambda v: matrix @ v, b, tolerance=1e-12, max_iterations=5, observe=lambda i, x: seen.append((i, x.clone()))
    )
    assert not found.converged
    assert (found.reason, found.iterations) == ("iterations", 5)
    assert [number for number, _ in seen] == [1, 2, 3, 4, 5]
    assert torch.equal(seen[-1][1], found.solution)
    for (number, x), line in zip(seen, found.record[1:], strict=True):
        assert line.number == number
        assert line.objective == pytest.approx(float(0.5 * x @ matrix @ x - b @ x), rel=1e-10)
        assert line.residual == pytest.approx(float((b - matrix @ x).norm() / b.norm()), rel=1e-8)


def test_martens_rule_is_what_the_record_says() -> None:
    matrix = torch.diag(torch.logspace(-4, 0, 300, dtype=torch.float64))
    b, epsilon = draw(300, seed=1), 5e-4
    found = conjugate_gradient(lambda v: matrix @ v, b, tolerance=1e-14, max_iterations=2000, progress=epsilon)
    assert found.reason == "progress"
    objectives = [line.objective for line in found.record]

    def stop(i: int) -> bool:
        k = max(10, -(-i // 10))
        return i > k and (objectives[i] - objectives[i - k]) / objectives[i] < k * epsilon

    assert stop(found.iterations)
    assert not any(stop(i) for i in range(1, found.iterations))
    assert not found.converged


def test_rounding_is_seen_and_said() -> None:
    # In float32 the true residual of a badly conditioned system stays far above the recursion's.
    basis = torch.linalg.qr(draw(60, 60)).Q
    matrix = (basis @ torch.diag(torch.logspace(-9, 0, 60, dtype=torch.float64)) @ basis.T).float()
    matrix = (matrix + matrix.T) / 2 + 3e-7 * torch.eye(60)
    b = draw(60, seed=1).float()
    found = conjugate_gradient(lambda v: matrix @ v, b, tolerance=2e-7, max_iterations=20_000)
    true = float((b.double() - matrix.double() @ found.solution.double()).norm() / b.double().norm())
    assert found.converged == (found.residual <= 2e-7)
    assert found.residual == pytest.approx(true, rel=0.5)
    assert not found.converged
    assert found.reason == "precision"


def test_zero_right_hand_side() -> None:
    found = conjugate_gradient(lambda v: 2 * v, torch.zeros(3))
    assert torch.equal(found.solution, torch.zeros(3))
    assert (found.converged, found.iterations, found.products) == (True, 0, 0)


def test_negative_and_zero_curvature_are_refused() -> None:
    b = torch.ones(2, dtype=torch.float64)
    with pytest.raises(
        torch.linalg.LinAlgError, match=r"matrix is not positive definite: p\^T A p = -1 in iteration 1"
    ):
        conjugate_gradient(lambda v: v * torch.tensor([1.0, -2.0]), b)
    with pytest.raises(torch.linalg.LinAlgError, match="use a larger damping"):
        conjugate_gradient(lambda v: 0 * v, b)
    with pytest.raises(torch.linalg.LinAlgError, match="preconditioner is not positive definite"):
        conjugate_gradient(lambda v: v, b, preconditioner=lambda r: -r)


def test_what_is_not_finite_is_refused() -> None:
    b = torch.ones(2)
    with pytest.raises(FloatingPointError, match="the product of iteration 1 is not finite"):
        conjugate_gradient(lambda v: v * torch.nan, b)
    with pytest.raises(FloatingPointError, match="b is not finite"):
        conjugate_gradient(lambda v: v, b * torch.inf)
    with pytest.raises(FloatingPointError, match=r"r\^T P r is NaN"):
        conjugate_gradient(lambda v: v, b, preconditioner=lambda r: r * torch.nan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, "tolerance must be at least"),
        ({"tolerance": 1e-9}, r"tolerance must be at least 1.2e-07 \(torch.float32\)"),
        ({"tolerance": 1.0}, "below 1"),
        ({"max_iterations": 0}, "max_iterations must be a positive integer"),
        ({"max_iterations": True}, "max_iterations must be a positive integer"),
        ({"progress": 0.0}, "progress must lie between 0 and 1"),
        ({"start": torch.ones(3)}, r"start has shapes \[\(3,\)\], b has \[\(2,\)\]"),
        ({"preconditioner": lambda r: r[:1]}, "the preconditioned residual has shapes"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conjugate_gradient(lambda v: v, torch.ones(2), **options)  # type: ignore[arg-type]


def test_vectors_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="operator's product must have the names of b"):
        conjugate_gradient(lambda v: {"y": v["x"]}, {"x": torch.ones(2)})
    with pytest.raises(ValueError, match="one floating dtype"):
        conjugate_gradient(lambda v: v, [torch.ones(2), torch.ones(2, dtype=torch.float64)])
    with pytest.raises(ValueError, match="must be a tensor, a sequence"):
        conjugate_gradient(lambda v: v, [])


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_a_right_hand_side_whose_norm_is_lost_is_refused(size: float) -> None:
    """Its squares vanish in float32, and zero would pass for the solution; or they are infinite, though it is not."""
    b = torch.full((5,), size)
    with pytest.raises(FloatingPointError, match=r"squares of b.*are beyond torch.float32: scale b"):
        conjugate_gradient(lambda v: 2 * v, b)
    found = conjugate_gradient(lambda v: 2 * v, b.double()).solution
    torch.testing.assert_close(found, b.double() / 2, rtol=1e-6, atol=0)
