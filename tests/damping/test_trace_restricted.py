"""TKFAC's dampings against equations (5.15) to (5.17), as dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from tests.blocks.block_cases import close, random_psd, random_tensor
from torch import Tensor

from kronfac.blocks import Block, Dense, Diagonal, DiagonalKronecker, Kronecker, ScaledKronecker, Uniform
from kronfac.damping import PerFactor, Rescaled, TraceRestricted, exact, expansion, factored, get_rule, normal


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def unit(n: int, seed: int) -> Tensor:
    matrix = random_psd(n, n, seed=seed)
    return matrix / matrix.trace()


def block(delta: float) -> ScaledKronecker:
    return ScaledKronecker(unit(4, 0), unit(3, 1), torch.tensor(delta, dtype=torch.float64))


def inverse(found: Block, rule: object, damping: float) -> Tensor:
    shift = rule(found, damping)  # type: ignore[operator]
    columns = found.factorise(shift).apply(eye(12).view(12, 3, 4))
    return columns.reshape(12, 12)


def test_normal_is_equation_5_15() -> None:
    found = block(0.7)
    phi, psi = math.sqrt(0.7) * found.input + 0.2 * eye(4), math.sqrt(0.7) * found.output + 0.2 * eye(3)
    close(inverse(found, normal, 0.04), torch.linalg.inv(torch.kron(psi, phi)))
    shift = normal(found, 0.04)
    assert isinstance(shift, PerFactor)
    close(torch.as_tensor(shift.input), torch.tensor(0.2, dtype=torch.float64))


def test_normal_does_not_depend_on_how_a_product_shares_its_scale() -> None:
    found = block(0.7)
    wanted = inverse(found, normal, 0.04)
    close(inverse(Kronecker(5 * found.input, 0.14 * found.output), normal, 0.04), wanted)
    diagonal = found.input.diagonal()
    scaled = ScaledKronecker(diagonal, found.output, found.delta)
    close(inverse(DiagonalKronecker(5 * diagonal, 0.14 * found.output), normal, 0.04), inverse(scaled, normal, 0.04))


def test_factored_differs_from_normal_by_the_dimensions() -> None:
    shift = factored(block(0.7), 0.04)
    assert isinstance(shift, PerFactor)
    close(torch.as_tensor(shift.input), torch.tensor(0.2 * math.sqrt(3 / 4), dtype=torch.float64))


@pytest.mark.parametrize("delta", [0.7, 1e-3])
@pytest.mark.parametrize("beta", [1.0, 30.0])
def test_trace_restricted_is_equation_5_16(delta: float, beta: float) -> None:
    found, raised = block(delta), max(0.1, beta * delta)
    root = math.sqrt(raised)
    for printed, added in ((False, root), (True, raised)):
        phi, psi = root * found.input + added / 4 * eye(4), root * found.output + added / 3 * eye(3)
        close(
            inverse(found, TraceRestricted(0.1, beta, printed), 123.0) * raised,
            torch.linalg.inv(torch.kron(psi, phi)) * raised,
        )


def test_each_stack_element_has_its_own_trace() -> None:
    delta = torch.tensor([1e-4, 0.5], dtype=torch.float64)
    stacked = ScaledKronecker(torch.stack([unit(4, 0), unit(4, 2)]), torch.stack([unit(3, 1), unit(3, 3)]), delta)
    shift = TraceRestricted(0.01)(stacked, 0.0)
    assert isinstance(shift, Rescaled)
    close(shift.scale, torch.tensor([0.01, 0.5], dtype=torch.float64))
    close(shift.input, shift.scale.sqrt() / 4)
    close(shift.output, shift.scale.sqrt() / 3)


def test_only_the_printed_form_changes_with_the_units_of_the_loss() -> None:
    vector = random_tensor(3, 4, seed=2)

    def solved(scale: float, printed: bool) -> Tensor:
        found = block(0.7 * scale)
        return scale * found.factorise(TraceRestricted(1e-9, printed=printed)(found, 0.0)).apply(vector)

    close(solved(100.0, False), solved(1.0, False))
    assert float((solved(100.0, True) - solved(1.0, True)).norm() / solved(1.0, True).norm()) > 0.5


def test_expansion_is_equation_5_17() -> None:
    deltas = [torch.tensor(0.5), torch.tensor([0.02, 0.004]), torch.tensor(3.0)]
    assert expansion(deltas, 0.01) == pytest.approx(0.01 / 0.004)
    assert expansion(deltas, 1e-4) == 1.0
    assert expansion([torch.tensor(0.0), torch.tensor(0.005)], 0.01) == pytest.approx(2.0), "no signal, no say"
    assert expansion([torch.tensor(0.0)], 0.01) == 1.0
    assert expansion([], 0.01) == 1.0


@pytest.mark.parametrize("other", [Diagonal(torch.ones(2, 3)), Dense(torch.eye(6), (2, 3))])
def test_blocks_without_factors_take_the_damping_itself(other: Block) -> None:
    assert normal(other, 0.1) == TraceRestricted()(other, 0.1) == exact(other, 0.1) == Uniform(0.1)


@pytest.mark.parametrize(
    "other", [Kronecker(torch.eye(2), torch.eye(3)), DiagonalKronecker(torch.ones(2), torch.eye(3))]
)
def test_trace_restricted_refuses_products_without_a_scale(other: Block) -> None:
    with pytest.raises(TypeError, match=rf"needs a ScaledKronecker block, got {type(other).__name__}.*'tkfac'"):
        TraceRestricted()(other, 0.1)


@pytest.mark.parametrize("bad", [-1e-3, math.nan, math.inf])
def test_bad_numbers_are_refused(bad: float) -> None:
    for rule in (normal, TraceRestricted()):
        with pytest.raises(ValueError, match="damping must be finite and not negative"):
            rule(block(0.5), bad)
    with pytest.raises(ValueError, match=r"nu=.*must be a number > 0"):
        TraceRestricted(nu=bad)
    with pytest.raises(ValueError, match=r"beta=.*must be a number >= 1"):
        TraceRestricted(beta=bad)
    with pytest.raises(ValueError, match="finite and not negative, got scale"):
        Rescaled(torch.tensor(bad), torch.tensor(1.0), torch.tensor(1.0))


def test_no_trace_at_all_is_no_least_trace() -> None:
    with pytest.raises(ValueError, match=r"nu=0 must be a number > 0"):
        TraceRestricted(nu=0)


def test_rules_by_name() -> None:
    assert get_rule("normal") is normal
    assert get_rule("trace_restricted") == TraceRestricted()
