"""Theorem 1 of Grosse & Martens (2016) against counting, and against Theorem 2, on homogeneous data and on images."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.exactness_helpers import double, draw
from torch import Tensor, nn

from kronfac.analysis import theorem1_factors, theorem1_gap
from kronfac.analysis.theorem1 import (
    autocovariance,
    boundary_counts,
    mean_activation,
    theorem1_input_factor,
    theorem1_output_factor,
)
from kronfac.approximations import KFAC, SUA
from kronfac.layers import adapt
from kronfac.sources import Sample

SIZES = [((5, 4), (1, 1)), ((7, 6), (2, 1)), ((2, 3), (2, 3)), ((6,), (2,)), ((3, 4, 2), (1, 1, 1)), ((1, 1), (2, 2))]
MODULES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def convolution(radius: tuple[int, ...], maps: int = 2, bias: bool = True) -> nn.Module:
    kernel = tuple(2 * r + 1 for r in radius)
    return double(MODULES[len(radius)](maps, 3, kernel, padding=radius, bias=bias))


def plug_in(layer: nn.Module, x: Tensor, approximation: type[KFAC] | type[SUA] = KFAC) -> dict[str, Tensor]:
    adapter = adapt(layer, "layer")
    statistic = approximation().start(adapter)
    g = draw(*layer(x).shape, seed=5)
    statistic.add(Sample(adapter, x, g, 1.0, float(len(x)), len(x), True))
    return statistic.block().tensors()


def shifted(x: Tensor) -> Tensor:
    """All cyclic shifts of the maps: their moments depend on the offset between locations alone, exactly."""
    dims = tuple(range(2, x.ndim))
    return torch.cat([x.roll(shift, dims) for shift in itertools.product(*(range(n) for n in x.shape[2:]))])


@pytest.mark.parametrize(("size", "radius"), SIZES)
def test_counts_are_counts(size: tuple[int, ...], radius: tuple[int, ...]) -> None:
    """By going through all locations; with filters larger than the map, where (24) as printed is wrong."""
    one, two = boundary_counts(size, radius)
    offsets = list(itertools.product(*(range(-r, r + 1) for r in radius)))
    places = list(itertools.product(*(range(n) for n in size)))

    def inside(place: tuple[int, ...], offset: tuple[int, ...]) -> bool:
        return all(0 <= p + d < n for p, d, n in zip(place, offset, size, strict=True))

    for i, first in enumerate(offsets):
        assert one[i] == sum(inside(place, first) for place in places)
        for j, second in enumerate(offsets):
            assert two[i, j] == sum(inside(place, first) and inside(place, second) for place in places)


def test_the_printed_count_goes_wrong_where_a_filter_exceeds_the_map() -> None:
    """Offsets 3 and -3 on two locations: (2 - 3 - 3) is no number of locations."""
    assert boundary_counts((2,), (3,))[1][0, -1] == 0.0


@pytest.mark.parametrize(("size", "radius"), SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_both_theorems_agree_on_homogeneous_data(size: tuple[int, ...], radius: tuple[int, ...], bias: bool) -> None:
    layer, x = convolution(radius, bias=bias), shifted(draw(3, 2, *size) + 0.5)
    found, wanted = theorem1_factors(layer, x, draw(*layer(x).shape, seed=5)), plug_in(layer, x)
    torch.testing.assert_close(found[0], wanted["input"], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(found[1], wanted["output"], rtol=1e-10, atol=1e-11)
    gap = theorem1_gap(layer, x)
    assert gap.error < 1e-10
    assert gap.least == pytest.approx(gap.plug_in_least, abs=1e-10)


def test_the_product_is_the_fisher_block_where_its_assumptions_hold() -> None:
    """IAD and SUD, which Theorem 1 needs beside SH: independent derivatives, white over locations, in expectation.

    Equation (45) by brute force: ``Σ_t Σ_t' E[a_{t+δ} a_{t'+δ'}] E[Ds_t Ds_t']`` with the data's own first moment
    matrix and a second one that is zero between locations.
    """
    layer, x = convolution((1, 1)), shifted(draw(2, 2, 4, 3))
    rows = adapt(layer, "layer").expand(x)
    gamma = draw(3, 3, seed=7)
    gamma = gamma @ gamma.T
    moments = torch.einsum("nta,nsb->tsab", rows, rows) / len(rows)
    derivatives = torch.einsum("ts,ij->tsij", torch.eye(12).double(), gamma)
    exact = torch.einsum("tsab,tsij->iajb", moments, derivatives).reshape(57, 57)
    block = torch.kron(12 * gamma, theorem1_input_factor(x, (1, 1)))
    torch.testing.assert_close(block, exact, rtol=1e-10, atol=1e-10)


def test_the_moments_by_hand() -> None:
    x = draw(4, 2, 3, 5)
    torch.testing.assert_close(mean_activation(x), x.mean((0, 2, 3)))
    found = autocovariance(x, (1, 2))
    assert found.shape == (2, 2, 3, 5)
    wanted = torch.einsum("njyx,nkyx->jk", x[:, :, :-1, 2:], x[:, :, 1:, :-2]) / (4 * 2 * 3)
    torch.testing.assert_close(found[:, :, 1 + 1, 2 - 2], wanted)
    torch.testing.assert_close(found[:, :, 1 - 1, 2 + 2], wanted.T)
    assert autocovariance(x, (4, 4))[:, :, 0].eq(0).all()


def test_uncorrelated_activations_are_theorem_1_with_another_autocovariance() -> None:
    """SUA (Theorem 4): ``β(δ, δ') (Σ 1(δ = δ') + M Mᵀ)``, on any data."""
    layer, x = convolution((1, 2)), draw(3, 2, 4, 5) + 1.0
    mean = mean_activation(x)
    sigma = autocovariance(x, (0, 0))[:, :, 0, 0] - mean[:, None] * mean[None, :]
    one, two = boundary_counts((4, 5), (1, 2))
    weight = torch.kron(sigma, two * torch.eye(15).double()) + torch.kron(mean[:, None] * mean[None, :], two)
    found = plug_in(layer, x, SUA)["input"]
    torch.testing.assert_close(found[:-1, :-1], weight / 20, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(found[-1, :-1], torch.kron(mean, one) / 20, rtol=1e-10, atol=1e-11)


def test_on_other_data_they_differ_and_the_analytic_one_may_be_indefinite() -> None:
    """A map with all its mass in a corner: far from homogeneous. The second moment of patches stays a moment."""
    layer, x = convolution((2, 2), maps=1), torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    x[0, 0, 0, 0] = x[0, 0, 2, 1] = 1.0
    gap = theorem1_gap(layer, x)
    assert gap.error > 0.1
    assert gap.least < -1e-3
    assert gap.plug_in_least > -1e-12


def test_the_output_factor_is_theorem_2s() -> None:
    g = draw(3, 2, 4, 5)
    rows = g.flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(theorem1_output_factor(g), rows.T @ rows / 3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"stride": 2, "padding": 1}, r"stride=\(2, 2\)"),
        ({"padding": 2}, r"padding=\(2, 2\)"),
        ({"padding": "valid"}, "padding='valid'"),
        ({"padding": 1, "padding_mode": "circular"}, "padding_mode='circular'"),
        ({"padding": 2, "dilation": 2}, "padding=|dilation="),
        ({"padding": "same", "dilation": 2}, r"dilation=\(2, 2\)"),
        ({"padding": 1, "groups": 2}, "groups=2"),
    ],
)
def test_layers_that_the_theorem_does_not_speak_of(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        theorem1_gap(nn.Conv2d(2, 2, 3, **options), draw(2, 2, 5, 5))  # type: ignore[arg-type]


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match=r"kernel_size=\(2, 3\)"):
        theorem1_gap(nn.Conv2d(2, 2, (2, 3), padding="same"), draw(2, 2, 5, 5))
    with pytest.raises(TypeError, match="not Linear"):
        theorem1_gap(nn.Linear(2, 2), draw(2, 2))  # type: ignore[arg-type]


def test_same_is_padding_by_the_radius() -> None:
    x = draw(2, 2, 5, 5)
    gaps = [theorem1_gap(double(nn.Conv2d(2, 3, 3, padding=padding)), x) for padding in ("same", 1)]
    assert gaps[0] == gaps[1]
