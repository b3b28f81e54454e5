"""What the damping rules add."""

from __future__ import annotations

import math

import pytest
import torch
from tests.blocks.block_cases import close, random_psd

from kronfac.blocks import Block, Dense, Diagonal, DiagonalKronecker, Kronecker, Uniform
from kronfac.damping import EachFactor, PerFactor, check_damping, exact, factored, get_rule


def test_factored_splits_by_the_trace_norm_with_dimensions() -> None:
    a, g = random_psd(2, 5, 5, seed=0), random_psd(2, 3, 3, seed=1)
    shift = factored(Kronecker(a, g), 0.04)
    assert isinstance(shift, PerFactor)
    for i in range(2):
        pi = math.sqrt((a[i].trace() / 5) / (g[i].trace() / 3))
        close(torch.as_tensor(shift.input)[i], torch.tensor(0.2 * pi, dtype=torch.float64))
        close(torch.as_tensor(shift.output)[i], torch.tensor(0.2 / pi, dtype=torch.float64))


def test_factored_on_a_diagonal_input_factor_equals_that_on_its_matrix() -> None:
    a, g = torch.rand(5, dtype=torch.float64), random_psd(3, 3, seed=1)
    shift, twin = factored(DiagonalKronecker(a, g), 0.1), factored(Kronecker(a.diag(), g), 0.1)
    assert isinstance(shift, PerFactor)
    assert isinstance(twin, PerFactor)
    close(torch.as_tensor(shift.input), torch.as_tensor(twin.input))
    close(torch.as_tensor(shift.output), torch.as_tensor(twin.output))


@pytest.mark.parametrize("zero", ["input", "output", "both"])
def test_a_factor_of_zero_trace_splits_evenly(zero: str) -> None:
    a, g = random_psd(4, 4, seed=0), random_psd(3, 3, seed=1)
    a, g = a * (zero == "output"), g * (zero == "input")
    shift = factored(Kronecker(a, g), 0.25)
    assert isinstance(shift, PerFactor)
    assert float(shift.input) == float(shift.output) == 0.5
    assert Kronecker(a, g).factorise(shift).apply(torch.ones(3, 4, dtype=torch.float64)).isfinite().all()


def test_a_ratio_beyond_the_dtype_splits_evenly() -> None:
    tiny, huge = torch.eye(2) * 1e-30, torch.eye(2) * 1e30
    for a, g in ((tiny, huge), (huge, tiny)):
        shift = factored(Kronecker(a, g), 1.0)
        assert isinstance(shift, PerFactor)
        assert float(shift.input) == float(shift.output) == 1.0


@pytest.mark.parametrize("block", [Diagonal(torch.ones(2, 3)), Dense(torch.eye(6), (2, 3))])
def test_factored_is_uniform_where_there_are_no_two_factors(block: Block) -> None:
    assert factored(block, 0.1) == Uniform(0.1)


def test_exact_is_uniform_everywhere() -> None:
    assert exact(Kronecker(torch.eye(2), torch.eye(3)), 0.1) == Uniform(0.1)
    assert exact(Diagonal(torch.ones(2, 3)), 0) == Uniform(0.0)


@pytest.mark.parametrize("bad", [-1e-3, math.nan, math.inf])
def test_damping_is_validated(bad: float) -> None:
    for rule in (factored, exact):
        with pytest.raises(ValueError, match="damping must be finite and not negative"):
            rule(Diagonal(torch.ones(2, 3)), bad)


def test_damping_that_is_no_number() -> None:
    with pytest.raises(TypeError, match="'much'"):
        check_damping("much")  # type: ignore[arg-type]
    for bad in ("1e-3", True):
        with pytest.raises(TypeError, match="damping must be a number"):
            check_damping(bad)  # type: ignore[arg-type]


def test_get_rule() -> None:
    assert get_rule("factored") is factored
    assert get_rule("exact") is exact
    assert get_rule(exact) is exact
    with pytest.raises(ValueError, match="unknown damping rule 'heroic'; accepted: 'factored', 'exact'"):
        get_rule("heroic")
    with pytest.raises(TypeError, match="got 3"):
        get_rule(3)  # type: ignore[arg-type]


def test_each_factor_gets_the_same_number_whatever_the_damping() -> None:
    a, g = random_psd(5, 5, seed=0), random_psd(3, 3, seed=1)
    shift = EachFactor(0.01)(Kronecker(a, 100 * g), 7.0)
    assert isinstance(shift, PerFactor)
    assert (shift.input, shift.output) == (0.01, 0.01)
    identity = torch.eye(15, dtype=torch.float64)
    assert EachFactor(0.01)(Dense(identity, torch.Size([3, 5])), 7.0) == Uniform(0.01**2)
    with pytest.raises(ValueError, match="damping must be finite and not negative, got -1"):
        EachFactor(-1.0)
