"""The weighted second moment of a convolution's rows, and their norms, against rows that the convolution gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.exactness_helpers import draw
from tests.layers.test_conv_moments import Convolution, check, convolutions, rows_by_forward

import kronfac.layers.conv_weighted as module_under_test
from kronfac.layers import adapt
from kronfac.layers.conv_weighted import _add_lines_, _add_patches_, row_norms
from kronfac.layers.geometry import Geometry
from kronfac.linalg.symmetric import mirror_


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(convolutions(), st.booleans())
def test_both_forms_equal_the_rows_over_a_grid_of_shapes(case: Convolution, apart: bool) -> None:
    """With weights shared by the groups, and with weights of their own."""
    module, x = case.module(), case.input()
    geometry, rows = Geometry.of(module), rows_by_forward(module, x)
    groups, positions = len(rows), rows.shape[1] // len(x)
    weights = draw(len(x), positions, groups if apart else 1, seed=3).square()
    each = weights.flatten(0, 1).T.expand(groups, -1).unsqueeze(-1)
    wanted, sums = rows.mT @ (each * rows), (each * rows).sum(1)
    for add in (_add_lines_, _add_patches_):
        total = torch.zeros_like(wanted)
        check(add(total, x, geometry, weights, 0.5), sums)
        check(mirror_(total), 0.5 * wanted)
    norms = row_norms(x, geometry)
    assert norms.shape == (len(x), positions, groups)
    torch.testing.assert_close(norms.flatten(0, 1).T, rows.square().sum(-1), rtol=1e-11, atol=1e-11)

    adapter = adapt(module, "conv")
    total = torch.zeros(*adapter.stack, adapter.d_in, adapter.d_in, dtype=torch.float64)
    given_weights = weights if apart and adapter.stack else weights[..., 0]
    count = adapter.add_input_gram_(total, x, given_weights)
    assert float(count) == pytest.approx(float(given_weights.sum()))
    each = each if apart and adapter.stack else weights[..., 0].flatten().expand(groups, -1).unsqueeze(-1)
    ones = torch.cat((rows, rows.new_ones(*rows.shape[:-1], 1)), -1) if case.bias else rows
    check(mirror_(total).reshape(groups, adapter.d_in, adapter.d_in), ones.mT @ (each * ones))


@pytest.mark.parametrize("entries", [1, 40, 1 << 21])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [2, 90])
def test_moments_do_not_depend_on_the_chunks(
    entries: int, stride: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer wide enough for kernel lines and for symmetric panels, and a narrow one."""
    monkeypatch.setattr("kronfac.layers.conv_lines.UNFOLDED", entries)
    monkeypatch.setattr(module_under_test, "PATCH_ENTRIES", entries)
    monkeypatch.setattr(module_under_test, "PATCH_ROWS", 1)
    case = Convolution(channels, 1, (5, 4), (3, 3), (stride, 1), (1, 1), (1, 1), "zeros", True, 3)
    module, x = case.module(), case.input()
    adapter = adapt(module, "conv")
    rows = torch.cat((rows_by_forward(module, x)[0], torch.ones(len(x) * adapter.positions(x)[1] * 4, 1)), -1)
    weights = draw(len(x), len(rows) // len(x), seed=1).square()
    total = torch.zeros(adapter.d_in, adapter.d_in, dtype=torch.float64)
    adapter.add_input_gram_(total, x, weights)
    check(mirror_(total), rows.T @ (weights.reshape(-1, 1) * rows))
