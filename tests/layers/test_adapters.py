"""Every adapter against autograd and against the module's own forward."""

from __future__ import annotations

import pytest
import torch
from tests.exactness_helpers import draw
from tests.layers.layer_cases import CASES, NORMS, PLAIN, variants
from torch import Tensor, nn

import kronfac as kf
from kronfac.layers import LayerAdapter, UnsupportedLayer, adapt
from kronfac.layers.norm import ChannelNorm
from kronfac.linalg.symmetric import mirror_

VARIANTS = variants(CASES)
MOMENTS = [
    (name, frozen, sharing)
    for name, frozen in variants(name for name in CASES if name not in NORMS)
    for sharing in ("expand", "reduce")
    if not (CASES[name].indices and sharing == "reduce")  # refused, see below
]


def adapted(name: str, frozen: str = "", sharing: str = "expand") -> tuple[nn.Module, LayerAdapter, Tensor]:
    case = CASES[name]
    module = case.module()
    if frozen:
        module.get_parameter(frozen).requires_grad_(False)
    return module, adapt(module, "layer", sharing), case.input()


def own_gradients(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(module(x), list(trained.values()), g)
    return {f"layer.{name}": gradient for name, gradient in zip(trained, gradients, strict=True)}


@pytest.mark.parametrize("name", PLAIN)
def test_the_matrix_times_the_rows_is_the_output(name: str) -> None:
    module, adapter, x = adapted(name)
    rows = adapter.expand(x)
    matrix = adapter.pack({key: p.detach() for key, p in adapter.parameters.items()})
    assert rows.shape[2:] == (*adapter.stack, adapter.d_in)
    assert matrix.shape == adapter.shape
    product = torch.einsum("...oi,bs...i->bs...o", matrix, rows)
    torch.testing.assert_close(product, adapter.expand_cotangents(module(x)).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "frozen"), VARIANTS)
def test_gradients_are_sums_of_outer_products(name: str, frozen: str) -> None:
    module, adapter, x = adapted(name, frozen)
    g = draw(*module(x).shape, seed=5)
    found = adapter.unpack(adapter.per_example_gradients(x, g).sum(0))
    wanted = own_gradients(module, x, g)
    assert adapter.parameter_names == tuple(wanted)
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gradients_belong_to_their_example(name: str) -> None:
    module, adapter, x = adapted(name)
    g = draw(*module(x).shape, seed=5)
    found = adapter.per_example_gradients(x, g)
    for n in range(x.shape[0]):
        alone = torch.zeros_like(g)
        alone[n] = g[n]
        wanted = adapter.pack(own_gradients(module, x, alone))
        torch.testing.assert_close(found[n], wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if name not in NORMS])
def test_expanded_rows_give_the_gradients_too(name: str) -> None:
    module, adapter, x = adapted(name)
    g = draw(*module(x).shape, seed=5)
    rows = adapter.expand(x).to(torch.float64)
    matrix = torch.einsum("bs...o,bs...i->...oi", adapter.expand_cotangents(g), rows)
    torch.testing.assert_close(matrix, adapter.pack(own_gradients(module, x, g)), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("name", "frozen", "sharing"), MOMENTS)
def test_second_moments_are_those_of_the_rows(name: str, frozen: str, sharing: str, weighted: bool) -> None:
    module, adapter, x = adapted(name, frozen, sharing)
    rows = adapter.rows(x).to(torch.float64)
    assert rows.shape[1] == (1 if sharing == "reduce" else adapter.expand(x).shape[1])
    weights = draw(*rows.shape[:2], seed=6).square() if weighted else None
    shape = (adapter.d_in,) if adapter.diagonal_input else (*adapter.stack, adapter.d_in, adapter.d_in)
    start = draw(*shape, seed=7)  # moments are added to what is there
    start = start if adapter.diagonal_input else start + start.mT
    total = start.clone()
    count = adapter.add_input_gram_(total, x, weights, 0.5)
    scaled = rows if weights is None else rows * weights.reshape(*rows.shape[:2], *(1,) * (rows.ndim - 2))
    wanted = 0.5 * torch.einsum("bs...i,bs...j->...ij", scaled, rows)
    found = total if adapter.diagonal_input else mirror_(total)
    wanted = wanted.diagonal() if adapter.diagonal_input else wanted
    torch.testing.assert_close(found - start, wanted, rtol=1e-11, atol=1e-11)
    assert float(count) == pytest.approx(rows.shape[:2].numel() if weights is None else float(weights.sum()))

    g = draw(*module(x).shape, seed=5)
    out = adapter.output_rows(g)
    start = draw(*adapter.stack, adapter.d_out, adapter.d_out, seed=3)
    total = (start + start.mT).clone()
    adapter.add_output_gram_(total, g, 0.25)
    wanted = 0.25 * torch.einsum("bs...i,bs...j->...ij", out, out)
    torch.testing.assert_close(mirror_(total) - start - start.mT, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("name", "frozen", "sharing"), MOMENTS)
def test_norms_are_those_of_the_rows_and_weigh_each_others_moments(name: str, frozen: str, sharing: str) -> None:
    """``[B, S, *stack]``: every stack element has norms of its own."""
    module, adapter, x = adapted(name, frozen, sharing)
    rows, g = adapter.rows(x).to(torch.float64), draw(*module(x).shape, seed=5)
    out = adapter.output_rows(g)
    inputs, outputs = rows.square().sum(-1), out.square().sum(-1)
    torch.testing.assert_close(adapter.input_norms(x).to(torch.float64), inputs, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(adapter.output_norms(g), outputs, rtol=1e-11, atol=1e-11)
    shape = (adapter.d_in,) if adapter.diagonal_input else (*adapter.stack, adapter.d_in, adapter.d_in)
    total = torch.zeros(shape, dtype=torch.float64)
    adapter.add_input_gram_(total, x, outputs, 0.5)
    wanted = 0.5 * torch.einsum("bs...,bs...i,bs...j->...ij", outputs, rows, rows)
    found = total if adapter.diagonal_input else mirror_(total)
    torch.testing.assert_close(found, wanted.diagonal() if adapter.diagonal_input else wanted, rtol=1e-11, atol=1e-11)
    total = torch.zeros(*adapter.stack, adapter.d_out, adapter.d_out, dtype=torch.float64)
    adapter.add_output_gram_(total, g, 0.25, inputs)
    wanted = 0.25 * torch.einsum("bs...,bs...i,bs...j->...ij", inputs, out, out)
    torch.testing.assert_close(mirror_(total), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["linear, positions", "conv2d, groups, dilated", "conv transpose 1d"])
def test_reduced_rows_are_means_and_cotangents_sums(name: str, sharing: str) -> None:
    module, adapter, x = adapted(name, sharing=sharing)
    rows, g = adapter.expand(x), adapter.expand_cotangents(draw(*module(x).shape))
    if sharing == "reduce":
        rows, g = rows.mean(1, keepdim=True), g.sum(1, keepdim=True)
    torch.testing.assert_close(adapter.rows(x), rows)
    torch.testing.assert_close(adapter.output_rows(draw(*module(x).shape)), g)


@pytest.mark.parametrize(("name", "frozen"), VARIANTS)
def test_pack_and_unpack_are_inverse(name: str, frozen: str) -> None:
    _, adapter, _ = adapted(name, frozen)
    tensors = {key: draw(*p.shape, seed=i) for i, (key, p) in enumerate(adapter.parameters.items())}
    back = adapter.unpack(adapter.pack(tensors))
    assert list(back) == list(tensors)
    for key, tensor in tensors.items():
        assert torch.equal(back[key], tensor)


@pytest.mark.parametrize("name", CASES)
def test_positions_count_the_rows(name: str) -> None:
    module, adapter, x = adapted(name)
    g = module(x)
    assert torch.Size(adapter.positions(x)).numel() == adapter.expand_cotangents(g).shape[:2].numel()
    assert adapter.positions(x)[0] == x.shape[0]


@pytest.mark.parametrize("name", NORMS)
def test_full_norm_blocks_hold_the_same_gradients(name: str) -> None:
    module, adapter, x = adapted(name)
    full = adapter.full()
    assert full.stack == ()
    assert full.shape == (adapter.stack[0], adapter.d_in)
    assert full.positions(x) == adapter.positions(x)
    g = draw(*module(x).shape, seed=5)
    torch.testing.assert_close(full.unpack(full.per_example_gradients(x, g).sum(0)), own_gradients(module, x, g))


@pytest.mark.parametrize("name", [name for name in PLAIN if name not in NORMS])
def test_low_precision_is_raised_to_float32(name: str) -> None:
    module, adapter, x = adapted(name)
    rows = adapter.expand(x.bfloat16())
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, adapter.expand(x.bfloat16().float()))
    assert adapter.expand_cotangents(module(x).detach().bfloat16()).dtype == torch.float32


def test_normalisation_is_computed_in_float32() -> None:
    """bfloat16 keeps eight bits: a mean over it would show."""
    module, adapter, x = adapted("layer norm")
    half = x.bfloat16()
    rows = adapter.expand(half)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(
        rows[..., 0], nn.functional.layer_norm(half.float(), module.normalized_shape, eps=0.1), rtol=1e-6, atol=1e-6
    )


def test_reading_train_mode_batch_norm_leaves_its_buffers() -> None:
    module = nn.BatchNorm1d(3).double().train()
    before = {key: value.clone() for key, value in module.named_buffers()}
    adapt(module, "layer").per_example_gradients(draw(4, 3), draw(4, 3))
    assert all(torch.equal(value, before[key]) for key, value in module.named_buffers())


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (3, 3, 4, 2)])
def test_gradients_of_train_mode_batch_norm_are_those_of_the_normalised_input(shape: tuple[int, ...]) -> None:
    """Far from zero too, where sums of products alone would cancel."""
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    adapter = adapt(kind(3, eps=0.1).double().train(), "layer")
    x, g = draw(*shape) + 1000.0, draw(*shape, seed=1)
    rows = adapter.expand(x) * adapter.expand_cotangents(g)
    torch.testing.assert_close(adapter.per_example_gradients(x, g).squeeze(-2), rows.sum(1), rtol=1e-10, atol=1e-11)


def test_batch_norm_by_sums_has_the_gradients_of_the_same_numbers() -> None:
    adapter = adapt(nn.BatchNorm2d(3).train(), "layer")
    assert isinstance(adapter, ChannelNorm)
    x, g = (draw(6, 3, 20, seed=seed).bfloat16() for seed in (0, 1))
    wanted = adapter.per_example_gradients(x.double(), g.double())
    found = adapter._gradients_by_sums(x, g)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)


REFUSED: dict[str, tuple[nn.Module, str, str]] = {
    "max_norm": (nn.Embedding(3, 2, max_norm=1.0), "expand", "max_norm"),
    "scale_grad_by_freq": (nn.Embedding(3, 2, scale_grad_by_freq=True), "expand", "scale_grad_by_freq"),
    "sparse": (nn.Embedding(3, 2, sparse=True), "expand", "sparse"),
    "reduced embedding": (nn.Embedding(3, 2), "reduce", "reduce"),
    "transposed padding": (nn.ConvTranspose1d(1, 1, 2, padding=2), "expand", "padding"),
    "sync batch norm": (nn.SyncBatchNorm(2), "expand", "SyncBatchNorm"),
    "no affine part": (nn.BatchNorm1d(2, affine=False), "expand", "affine"),
    "attention": (nn.MultiheadAttention(4, 2).out_proj, "expand", "MultiheadAttention"),
    "unknown": (nn.Bilinear(2, 2, 2), "expand", "Bilinear"),
    "recurrent": (nn.LSTM(2, 2), "expand", "LSTM"),
}


@pytest.mark.parametrize(("module", "sharing", "word"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_exact_is_refused_by_name(module: nn.Module, sharing: str, word: str) -> None:
    with pytest.raises(UnsupportedLayer, match=word):
        adapt(module, "layer", sharing)


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(3, 2), torch.zeros(3)),
        (nn.Conv2d(1, 1, 2), torch.zeros(1, 4, 4)),
        (nn.Conv1d(2, 2, 1), torch.zeros(2, 3)),
    ],
)
def test_inputs_without_batch_dimension_are_refused(module: nn.Module, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"shape \(.*no batch dimension; add one"):
        adapt(module, "layer").expand(x)


UNBATCHED: dict[str, tuple[nn.Module, Tensor, Tensor]] = {
    "linear": (nn.Linear(4, 3), torch.randn(4), torch.randn(3)),
    "convolution": (nn.Conv2d(2, 3, 3), torch.randn(2, 5, 5), torch.randn(3, 3, 3)),
    "transposed convolution": (nn.ConvTranspose1d(2, 3, 3), torch.randn(2, 5), torch.randn(3, 7)),
    "embedding": (nn.Embedding(4, 3), torch.tensor(2), torch.randn(3)),
    "layer norm": (nn.LayerNorm((3, 4)), torch.randn(3, 4), torch.randn(3, 4)),
    "RMS norm": (nn.RMSNorm(4), torch.randn(4), torch.randn(4)),
    # As many lines as channels: this one fitted, and was wrong.
    "instance norm": (nn.InstanceNorm2d(4, affine=True), torch.randn(4, 4, 5), torch.randn(4, 4, 5)),
}


@pytest.mark.parametrize("norm", ["unitwise", "full"])
@pytest.mark.parametrize("source", ["sampled", "exact"])
@pytest.mark.parametrize(("layer", "x", "y"), UNBATCHED.values(), ids=UNBATCHED)
def test_estimates_of_a_single_example_without_a_batch_name_the_layer(
    layer: nn.Module, x: Tensor, y: Tensor, source: str, norm: str
) -> None:
    with pytest.raises(ValueError, match=r"Layer '0'.*shape \(.*no batch dimension; add one"):
        kf.estimate(nn.Sequential(layer), kf.Gaussian(), [(x, y)], source=source, norm=norm)
