"""The second moment of a convolution's rows without the rows, against rows that the convolution itself gives."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from tests.exactness_helpers import draw
from torch import Tensor, nn

from kronfac.layers import adapt, conv_lags
from kronfac.layers.conv_lags import MOST_IN_SEGMENTS, add_by_lags_, lags_pay
from kronfac.layers.conv_moments import _neighbour_taps, add_row_correlation_, row_correlation_pays
from kronfac.layers.geometry import Geometry, column_sums, im2col
from kronfac.linalg.symmetric import mirror_

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class Convolution(NamedTuple):
    channels: int
    groups: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...] | str
    mode: str
    bias: bool
    batch: int

    def module(self) -> nn.Module:
        return CONVOLUTIONS[len(self.size)](
            self.channels,
            2 * self.groups,
            self.kernel,
            stride=self.stride,
            dilation=self.dilation,
            padding=self.padding,
            padding_mode=self.mode,
            groups=self.groups,
            bias=self.bias,
        ).double()

    def input(self) -> Tensor:
        return draw(self.batch, self.channels, *self.size)


@st.composite
def convolutions(draw_: st.DrawFn) -> Convolution:
    dims = draw_(st.integers(1, 3))
    groups = draw_(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw_(st.integers(1, 2 if dims == 3 else 3))
    mode = draw_(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    same = draw_(st.sampled_from([False, False, False, True]))
    size, kernel, stride, dilation, padding = [], [], [], [], []
    for _ in range(dims):
        k = draw_(st.integers(1, 3 if dims == 3 else 5))
        d = draw_(st.integers(1, 3))
        s = 1 if same else draw_(st.integers(1, 4))
        p = draw_(st.integers(0, 3))
        reach = d * (k - 1) + 1
        least = max(1, reach - 2 * p) if not same else 1
        # torch pads by reflection with less than the map, circularly with no more than it.
        padded = -(-(reach - 1) // 2) if same else p
        least = max(least, padded + (mode == "reflect"), padded * (mode == "circular"))
        size.append(draw_(st.integers(least, least + (4 if dims == 3 else 9))))
        kernel.append(k), stride.append(s), dilation.append(d), padding.append(p)
    return Convolution(
        channels,
        groups,
        tuple(size),
        tuple(kernel),
        tuple(stride),
        tuple(dilation),
        "same" if same else tuple(padding),
        mode,
        draw_(st.booleans()),
        draw_(st.integers(1, 3)),
    )


def rows_by_forward(module: nn.Module, x: Tensor) -> Tensor:
    """Rows ``[groups, N T, columns]``: outputs of the same convolution with one-hot filters."""
    columns = module.weight[0].numel()
    probe = type(module)(
        module.in_channels,
        module.groups * columns,
        module.kernel_size,
        stride=module.stride,
        dilation=module.dilation,
        padding=module.padding,
        padding_mode=module.padding_mode,
        groups=module.groups,
        bias=False,
    ).double()
    with torch.no_grad():
        probe.weight.copy_(torch.eye(columns).repeat(module.groups, 1).view_as(probe.weight))
        out = probe(x)
    return out.flatten(2).movedim(1, -1).flatten(0, 1).unflatten(-1, (module.groups, columns)).movedim(1, 0)


def check(found: Tensor, wanted: Tensor) -> None:
    scale = wanted.abs().max().clamp_min(1e-300)
    assert float((found - wanted).abs().max() / scale) <= 1e-10


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_both_forms_equal_im2col_over_a_grid_of_shapes() -> None:
    fast: list[bool] = []

    @settings(max_examples=800, deadline=None, derandomize=True, database=None)
    @given(convolutions())
    def compare(case: Convolution) -> None:
        module, x = case.module(), case.input()
        geometry = Geometry.of(module)
        by_lags = lags_pay(x, geometry)
        taken = by_lags or row_correlation_pays(geometry, case.size)
        fast.append(taken)
        event("lags" if by_lags else "row correlation" if taken else "im2col")
        rows = rows_by_forward(module, x)
        check(im2col(x, geometry).flatten(0, 1).movedim(1, 0), rows)
        check(column_sums(x, geometry), rows.sum(1))
        ones = rows.new_ones(*rows.shape[:-1], 1)
        wanted = torch.cat((rows, ones), -1) if case.bias else rows
        wanted = wanted.mT @ wanted

        # Whatever the layer chooses ...
        adapter = adapt(module, "conv")
        total = torch.zeros(*adapter.stack, adapter.d_in, adapter.d_in, dtype=torch.float64)
        count = adapter.add_input_gram_(total, x)
        assert count == rows.shape[1]
        check(mirror_(total).reshape_as(wanted), wanted)
        # ... and the row-correlation form, where it does not pay too.
        inner = torch.zeros(case.groups, rows.shape[-1], rows.shape[-1], dtype=torch.float64)
        add_row_correlation_(inner, x, geometry)
        check(mirror_(inner), rows.mT @ rows)

    compare()
    assert sum(fast) >= 30, f"the fast path was taken only {sum(fast)} times in {len(fast)}"
    assert len(fast) - sum(fast) >= 30


def test_taps_slid_along_the_last_dimension() -> None:
    """Wide layers with unit stride and dilation there; the other dimensions are free."""
    slid: list[bool] = []

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(
        channels=st.sampled_from([15, 16, 32]),
        kernel=st.tuples(st.integers(2, 4), st.integers(3, 5)),
        between=st.sampled_from([None, None, 1, 2]),
        stride=st.integers(1, 2),
        dilation=st.integers(1, 2),
        padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
        size=st.tuples(st.integers(8, 11), st.integers(5, 9)),
        mode=st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]),
        batch=st.integers(1, 2),
    )
    def compare(channels, kernel, between, stride, dilation, padding, size, mode, batch) -> None:
        middle = () if between is None else (between,)
        case = Convolution(
            channels,
            1,
            (size[0], *(3 for _ in middle), size[1]),
            (kernel[0], *middle, kernel[1]),
            (stride, *(2 for _ in middle), 1),
            (dilation, *(1 for _ in middle), 1),
            (padding[0], *(0 for _ in middle), padding[1]),
            mode,
            False,
            batch,
        )
        module, x = case.module(), case.input()
        geometry = Geometry.of(module)
        slid.append(_neighbour_taps(geometry, channels) > 0)
        rows = rows_by_forward(module, x)[0]
        total = torch.zeros(1, rows.shape[1], rows.shape[1], dtype=torch.float64)
        add_row_correlation_(total, x, geometry, alpha=0.5)
        check(mirror_(total)[0], 0.5 * rows.T @ rows)

    compare()
    assert sum(slid) >= 15, f"taps were slid only {sum(slid)} times in {len(slid)}"


@pytest.mark.parametrize("weighted", [False, True])
def test_the_layer_takes_the_fast_path_only_without_weights(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import kronfac.layers.conv_moments as unweighted
    import kronfac.layers.conv_weighted as with_weights

    calls: list[str] = []
    for module, name in ((unweighted, "add_by_lags_"), (with_weights, "_patch_columns")):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, _name=name, _original=original: (calls.append(_name), _original(*a))[1]
        )
    adapter = adapt(nn.Conv2d(3, 4, 3, padding=1).double(), "conv")
    x = draw(2, 3, 8, 8)
    total = torch.zeros(28, 28, dtype=torch.float64)
    adapter.add_input_gram_(total, x, draw(2, 64).square() if weighted else None)
    assert calls == ["_patch_columns" if weighted else "add_by_lags_"]


def test_weights_of_positions_enter_the_moment() -> None:
    module = nn.Conv2d(2, 4, 3, padding=1, stride=2, groups=2).double()
    x, weights = draw(3, 2, 6, 5), draw(3, 9, seed=1).square()
    rows = torch.cat((rows_by_forward(module, x), torch.ones(2, 27, 1, dtype=torch.float64)), -1)
    adapter = adapt(module, "conv")
    total = torch.zeros(2, 10, 10, dtype=torch.float64)
    count = adapter.add_input_gram_(total, x, weights)
    assert float(count) == pytest.approx(float(weights.sum()))
    check(mirror_(total), rows.mT @ (rows * weights.reshape(1, -1, 1)))


def test_moments_are_added_to_what_is_there() -> None:
    module = nn.Conv1d(2, 2, 5, padding=2).double()
    adapter = adapt(module, "conv")
    whole, parts = (torch.zeros(11, 11, dtype=torch.float64) for _ in range(2))
    x = draw(4, 2, 12)
    adapter.add_input_gram_(whole, x)
    adapter.add_input_gram_(parts, x[:1])
    adapter.add_input_gram_(parts, x[1:])
    check(mirror_(parts), mirror_(whole))


def test_inputs_of_any_layout() -> None:
    adapter = adapt(nn.Conv2d(3, 4, 3, padding=1).double(), "conv")
    x = draw(2, 3, 6, 7)
    totals = [torch.zeros(28, 28, dtype=torch.float64) for _ in range(3)]
    inputs = (x, x.contiguous(memory_format=torch.channels_last), draw(2, 3, 7, 6).mT)
    inputs = (*inputs[:2], inputs[2].copy_(x))
    for total, given_x in zip(totals, inputs, strict=True):
        adapter.add_input_gram_(total, given_x)
    assert not inputs[2].is_contiguous()
    check(totals[1], totals[0])
    check(totals[2], totals[0])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    dims=st.integers(1, 3),
    groups=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    extra=st.integers(0, 1),
    size=st.integers(1, 3),
)
def test_transposed_rows_times_the_weight_are_the_output(
    dims: int, groups: int, kernel: int, stride: int, dilation: int, padding: int, extra: int, size: int
) -> None:
    padding = min(padding, dilation * (kernel - 1), ((size - 1) * stride + dilation * (kernel - 1)) // 2)
    extra = min(extra, max(stride, dilation) - 1)
    module = TRANSPOSED[dims](
        2 * groups, groups, kernel, stride, padding, extra, groups=groups, dilation=dilation
    ).double()
    x = draw(2, 2 * groups, *(size,) * dims)
    adapter = adapt(module, "conv")
    rows = adapter.expand(x)
    matrix = adapter.pack({key: p.detach() for key, p in adapter.parameters.items()})
    product = torch.einsum("...oi,bs...i->bs...o", matrix, rows)
    torch.testing.assert_close(product, adapter.expand_cotangents(module(x)).detach(), rtol=1e-11, atol=1e-12)
    total = torch.zeros(*adapter.stack, adapter.d_in, adapter.d_in, dtype=torch.float64)
    adapter.add_input_gram_(total, x)
    check(mirror_(total), torch.einsum("bs...i,bs...j->...ij", rows, rows))


def test_autocorrelations_equal_im2col_where_taps_miss_much_and_little() -> None:
    """Both ways to the lags, with the rims subtracted, also for shapes for which this form does not pay."""
    paying: list[bool] = []

    @settings(max_examples=120, deadline=None, derandomize=True, database=None)
    @given(
        channels=st.sampled_from([1, 2, 3, 15, 16, 17]),
        kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
        dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
        beyond=st.tuples(st.integers(0, 12), st.integers(0, 12)),
        batch=st.integers(1, 4),
        dtype=st.sampled_from([torch.float32, torch.float64]),
    )
    def compare(channels, kernel, dilation, padding, beyond, batch, dtype) -> None:
        parts = zip(kernel, dilation, padding, beyond, strict=True)
        size = [max(1, d * (k - 1) + 1 - 2 * p) + more for k, d, p, more in parts]
        geometry = Geometry(kernel, (1, 1), dilation, tuple((p, p) for p in padding), "constant", 1)
        x = draw(batch, channels, *size).to(dtype)
        paying.append(lags_pay(x, geometry))
        rows = im2col(x.double(), geometry).flatten(0, 2)
        total = torch.zeros(rows.shape[1], rows.shape[1], dtype=dtype)
        add_by_lags_(total, x, geometry, alpha=0.5)
        # Relative to the whole map: what the taps miss was in the sums.
        scale = x.double().square().sum((0, 2, 3)).max()
        error = (mirror_(total).double() - 0.5 * rows.T @ rows).abs().max() / scale
        assert float(error) <= (1e-6 if dtype == torch.float32 else 1e-14)

    compare()
    assert 20 <= sum(paying) <= len(paying) - 20, f"this form pays {sum(paying)} times in {len(paying)}"


@pytest.mark.parametrize("channels", [3, 16])
def test_autocorrelations_are_summed_part_by_part(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry.of(nn.Conv2d(channels, 2, 3, padding=1))
    x = draw(7, channels, 6, 9).float()
    whole, parts = (torch.zeros(9 * channels, 9 * channels) for _ in range(2))
    add_by_lags_(whole, x, geometry)
    monkeypatch.setattr(conv_lags, "POSITIONS", 20)  # two examples of a rim, one of the map
    monkeypatch.setattr(conv_lags, "ENTRIES", 2 * x[0].numel())
    add_by_lags_(parts, x, geometry)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert not torch.equal(parts, whole)


@pytest.mark.parametrize(("channels", "size", "kernel"), [(3, 32, 5), (16, 32, 3), (32, 16, 5), (64, 8, 3)])
def test_float32_moments_of_the_benchmark_shapes_are_those_of_the_plain_product(
    channels: int, size: int, kernel: int
) -> None:
    module = nn.Conv2d(channels, 2, kernel, padding=kernel // 2, bias=False)
    x = draw(64, channels, size, size).float().relu()
    adapter, total = adapt(module, "conv"), torch.zeros(channels * kernel**2, channels * kernel**2)
    assert lags_pay(x, Geometry.of(module)) or channels > MOST_IN_SEGMENTS
    adapter.add_input_gram_(total, x)
    wanted = torch.zeros(1, *total.shape, dtype=torch.float64)
    add_row_correlation_(wanted, x.double(), Geometry.of(module))
    assert float((mirror_(total) - mirror_(wanted[0])).abs().max() / wanted.abs().max()) <= 1e-6


def test_lags_of_many_channels_are_left_to_libraries_that_keep_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    x, geometry = draw(2, 64, 16, 16).float(), Geometry.of(nn.Conv2d(64, 2, 3, padding=1))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert lags_pay(x, geometry)
    assert not lags_pay(x.double(), geometry)  # its weight gradient is slow
    before = torch.backends.mkldnn.conv.fp32_precision
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    try:
        assert not lags_pay(x, geometry)
        assert lags_pay(x[:, :16], geometry)  # these are matrix products of its own
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not lags_pay(x, geometry)
