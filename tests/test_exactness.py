"""Where theory says that KFAC is exact, it is: to 1e-8 in float64 against the oracle's Gauss-Newton matrix.

Three families: deep linear networks with many data, whose Jacobian is constant; a single datum with any network, whose
rows are one; and, for the dense and diagonal approximations, everything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.exactness_helpers import block_errors, double, draw, ggn_errors, positions, relative
from tests.layers.layer_cases import CASES, NORMS
from torch import Tensor, nn

import kronfac as kf
from kronfac.blocks import Dense, Diagonal, DiagonalKronecker, Kronecker

TOLERANCE = 1e-8


def check(errors: dict[str, float], layers: int) -> None:
    assert len(errors) == layers
    assert max(errors.values()) <= TOLERANCE, errors


def mlp(*widths: int, activation: Callable[[], nn.Module] | None = None, seed: int = 0, bias: bool = True) -> nn.Module:
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        parts += [nn.Linear(before, after, bias=bias), *([activation()] if activation else [])]
    return double(nn.Sequential(*(parts[:-1] if activation else parts)), seed)


# ------------------------------------------------------------------------------------------ deep linear, many data
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
def test_deep_linear_network_with_many_data(reduction: str, bias: bool) -> None:
    model = mlp(4, 5, 3, 2, bias=bias)
    check(ggn_errors(model, kf.Gaussian(0.7, reduction), draw(20, 4), draw(20, 2, seed=1)), 3)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_batches_add_up_to_the_whole_data_set(reduction: str) -> None:
    """Of unequal sizes: an average of averages would be wrong."""
    model, likelihood = mlp(4, 5, 2), kf.Gaussian(2.0, reduction)
    x, y = draw(17, 4), draw(17, 2, seed=1)
    whole = kf.reference.ggn(model, likelihood, x, y)
    loader = list(zip(x.split([2, 9, 6]), y.split([2, 9, 6]), strict=True))
    check(block_errors(kf.estimate(model, likelihood, loader, source="exact"), model, whole), 2)


def constant_predictions(model: nn.Module, rows: int) -> Tensor:
    """Inputs that differ where a deep linear model does not look: its predictions, and their Hessian, are all equal."""
    total = torch.linalg.multi_dot([layer.weight.detach() for layer in reversed(list(model))])
    null = torch.linalg.svd(total).Vh[total.shape[0] :]
    return draw(total.shape[1]) + draw(rows, len(null), seed=1) @ null


WEIGHT = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
INDICES = torch.tensor([0, 1, 2, 1, -100, 0, -100, 2, 2, 1, 0, 1])
SOFT = draw(12, 3, seed=4).softmax(1)
COINS = torch.tensor([[0.0, 1, 1], [1, 0, 1], [0, 0, 1]], dtype=torch.float64).repeat(4, 1)
FLOAT_MASK = draw(12, seed=3).square()
BOOL_MASK = torch.arange(12) % 3 != 0

WEIGHTED: dict[str, tuple[Callable[[str], kf.Likelihood], Any]] = {
    "categorical": (lambda r: kf.Categorical(reduction=r), INDICES.abs() % 3),
    "class weights": (lambda r: kf.Categorical(WEIGHT, reduction=r), INDICES.abs() % 3),
    "ignored": (lambda r: kf.Categorical(ignore_index=-100, reduction=r), INDICES),
    "smoothing": (lambda r: kf.Categorical(label_smoothing=0.2, reduction=r), INDICES.abs() % 3),
    "everything": (lambda r: kf.Categorical(WEIGHT, -100, 0.2, r), INDICES),
    "soft labels": (lambda r: kf.Categorical(WEIGHT, label_smoothing=0.1, reduction=r), SOFT),
    "soft labels of any sum": (lambda r: kf.Categorical(reduction=r), SOFT * FLOAT_MASK[:, None].clamp(0, 1)),
    "boolean mask": (lambda r: kf.Categorical(reduction=r), (INDICES.abs() % 3, BOOL_MASK)),
    "weights as a mask": (lambda r: kf.Categorical(WEIGHT, reduction=r), (INDICES.abs() % 3, FLOAT_MASK)),
    "bernoulli": (lambda r: kf.Bernoulli(reduction=r), COINS),
    "bernoulli, weights": (lambda r: kf.Bernoulli(WEIGHT, reduction=r), COINS),
    "bernoulli, mask": (lambda r: kf.Bernoulli(reduction=r), (COINS, FLOAT_MASK)),
    "gaussian, mask": (lambda r: kf.Gaussian(0.4, r), (draw(12, 3, seed=5), FLOAT_MASK)),
    "gaussian, boolean mask": (lambda r: kf.Gaussian(0.4, r), (draw(12, 3, seed=5), BOOL_MASK)),
}


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("case", WEIGHTED)
def test_weighted_rows_of_a_deep_linear_network(case: str, reduction: str) -> None:
    """Weights differ between rows: they must enter both factors, and ignored rows neither."""
    make, targets = WEIGHTED[case]
    model = mlp(7, 6, 3, bias=False)
    check(ggn_errors(model, make(reduction), constant_predictions(model, 12), targets), 2)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_pos_weight_with_every_input_under_every_label(reduction: str) -> None:
    """The Hessian depends on the label, so that inputs and labels must be independent for the product to be exact."""
    model = mlp(7, 6, 3, bias=False)
    x = constant_predictions(model, 4).repeat_interleave(3, 0)
    pos_weight = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    check(ggn_errors(model, kf.Bernoulli(WEIGHT, pos_weight, reduction), x, COINS), 2)


# ------------------------------------------------------------------------------------------ one datum, any network
ONE: dict[str, tuple[Callable[[str], kf.Likelihood], Any]] = {
    "categorical": (lambda r: kf.Categorical(reduction=r), torch.tensor([1])),
    "class weights": (lambda r: kf.Categorical(WEIGHT, reduction=r), torch.tensor([1])),
    "ignore_index": (lambda r: kf.Categorical(ignore_index=0, reduction=r), torch.tensor([2])),
    "smoothing": (lambda r: kf.Categorical(label_smoothing=0.3, reduction=r), torch.tensor([1])),
    "everything": (lambda r: kf.Categorical(WEIGHT, -100, 0.3, r), torch.tensor([0])),
    "soft labels": (lambda r: kf.Categorical(WEIGHT, label_smoothing=0.1, reduction=r), SOFT[:1]),
    "mask": (lambda r: kf.Categorical(reduction=r), (torch.tensor([1]), torch.tensor([0.3]))),
    "bernoulli": (lambda r: kf.Bernoulli(reduction=r), COINS[:1]),
    "pos_weight": (lambda r: kf.Bernoulli(WEIGHT, 2 * WEIGHT, r), COINS[:1]),
    "bernoulli, mask": (lambda r: kf.Bernoulli(reduction=r), (COINS[:1], torch.tensor([[True, False, True]]))),
    "gaussian": (lambda r: kf.Gaussian(0.3, r), draw(1, 3, seed=5)),
    "gaussian, mask": (lambda r: kf.Gaussian(0.3, r), (draw(1, 3), torch.tensor([[1.0, 0.5, 0.0]]))),
}


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("case", ONE)
def test_one_datum_with_a_nonlinear_network(case: str, reduction: str) -> None:
    make, targets = ONE[case]
    check(ggn_errors(mlp(4, 5, 4, 3, activation=nn.Tanh), make(reduction), draw(1, 4), targets), 3)


@pytest.mark.parametrize(
    "module", [nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), nn.MSELoss(), nn.BCEWithLogitsLoss()]
)
def test_likelihoods_of_loss_modules(module: nn.Module) -> None:
    """The Hessian of torch's own loss, by autograd, without any of our likelihoods."""
    model, x = mlp(4, 5, 3, activation=nn.Sigmoid), draw(1, 4)
    y = torch.tensor([1]) if isinstance(module, nn.CrossEntropyLoss) else COINS[:1]
    z = model(x).detach()
    hessian = torch.autograd.functional.hessian(lambda out: module(out, y), z).reshape(3, 3)
    rows = [torch.autograd.grad(model(x)[0, k], list(model.parameters())) for k in range(3)]
    jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    curvature = kf.estimate(model, kf.likelihood_of(module), (x, y), source="exact")
    check(block_errors(curvature, model, jacobian.T @ hessian @ jacobian), 2)


# ------------------------------------------------------------------------------------------ convolutions, 1x1 maps
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MODES = ["zeros", "reflect", "replicate", "circular"]


def one_output(kernel: tuple[int, ...], stride: int, dilation: int, padding: int) -> tuple[int, ...]:
    """The largest input size of which the output map has one position."""
    return tuple(dilation * (k - 1) + 1 - 2 * padding + stride - 1 for k in kernel)


def convolutional(layer: nn.Module, size: tuple[int, ...], outputs: int, nonlinear: bool) -> nn.Module:
    """A layer before, so that the inputs are activations, and one after, so that the cotangents are not the loss's."""
    channels = layer.in_channels
    first = CONVOLUTIONS[len(size) - 1](1, channels, 1)
    middle = [nn.Tanh()] if nonlinear else []
    return double(nn.Sequential(first, *middle, layer, *middle, nn.Flatten(), nn.Linear(layer.out_channels, outputs)))


def compare_convolution(layer: nn.Module, size: tuple[int, ...]) -> None:
    """One datum with activations between, many without; the layer in question is the only one compared."""
    many = convolutional(layer, size, 2, nonlinear=False)
    one = convolutional(layer, size, 3, nonlinear=True)
    assert one[:3](draw(1, 1, *size)).shape[2:].numel() == 1
    for model, x, likelihood, y in (
        (many, draw(5, 1, *size), kf.Gaussian(0.5), draw(5, 2)),
        (one, draw(1, 1, *size), kf.Categorical(WEIGHT, label_smoothing=0.1), torch.tensor([1])),
    ):
        model[0].requires_grad_(False)
        model[-1].requires_grad_(False)
        check(ggn_errors(model, likelihood, x, y), 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dims", [1, 2])
def test_convolutions_with_one_output_position(dims: int, mode: str) -> None:
    kernel = (4, 5)[:dims]
    seen = 0
    for stride, dilation, groups, padding in itertools.product((1, 2, 3), (1, 2), (1, 2, 4), (0, 1)):
        size = one_output(kernel, stride, dilation, padding)
        layer = CONVOLUTIONS[dims - 1](
            4, 4, kernel, stride, padding, dilation, groups, bias=stride != 2, padding_mode=mode
        )
        compare_convolution(layer, size)
        seen += 1
    assert seen == 36


@pytest.mark.parametrize("mode", MODES)
def test_volumes_with_one_output_position(mode: str) -> None:
    if mode == "reflect":
        kernel, padding = (4, 4, 4), 1
    else:
        kernel, padding = (3, 2, 3), 1
    for stride, dilation, groups in itertools.product((2, 3), (1, 2), (1, 2)):
        layer = nn.Conv3d(2, 2, kernel, stride, padding, dilation, groups, padding_mode=mode)
        compare_convolution(layer, one_output(kernel, stride, dilation, padding))


@pytest.mark.parametrize("mode", ["zeros", "replicate", "circular"])
@pytest.mark.parametrize("groups", [1, 2])
def test_padding_same_on_a_map_of_one_position(groups: int, mode: str) -> None:
    compare_convolution(nn.Conv2d(2, 2, 3, padding="same", groups=groups, padding_mode=mode), (1, 1))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions_with_one_output_position(dims: int) -> None:
    """``(n - 1) stride - 2 padding + dilation (kernel - 1) + output_padding = 0``."""
    seen = 0
    options = itertools.product((1, 2), (1, 2, 3), (1, 2), (2, 3), (0, 1, 2, 3), (0, 1), (1, 2, 4))
    for size, stride, dilation, kernel, padding, extra, groups in options:
        reach = dilation * (kernel - 1)
        if (size - 1) * stride - 2 * padding + reach + extra or padding > reach or extra >= max(stride, dilation):
            continue
        layer = TRANSPOSED[dims - 1](4, 4, kernel, stride, padding, extra, groups, dilation=dilation)
        compare_convolution(layer, (size,) * dims)
        seen += 1
    assert seen >= 20


# ------------------------------------------------------------------------------------------ positions: expand, reduce
class MeanPooled(nn.Module):
    """Tokens through linear layers, averaged: the setting of *reduce* (Eschenhagen et al. 2023, section 3)."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = mlp(*widths)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(tuple(range(1, x.ndim - 1)))


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_expand_is_exact_for_token_wise_deep_linear_networks(reduction: str) -> None:
    model = mlp(4, 5, 2)
    check(ggn_errors(model, kf.Gaussian(0.7, reduction), draw(6, 3, 4), draw(6, 3, 2)), 2)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
def test_reduce_is_exact_for_mean_pooled_deep_linear_networks(reduction: str, masked: bool) -> None:
    model, likelihood = MeanPooled(4, 5, 2), kf.Gaussian(0.7, reduction)
    y = draw(6, 2)
    targets = (y, draw(6, seed=3).square()) if masked else y
    for x in (draw(6, 3, 4), draw(6, 3, 2, 4)):
        check(ggn_errors(model, likelihood, x, targets, sharing="reduce"), 2)
        assert min(ggn_errors(model, likelihood, x, targets, sharing="expand").values()) > 1e-3


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("class_dim", [1, -1])
def test_ignored_tokens_count_in_neither_factor(reduction: str, class_dim: int) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp(7, 6, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            z = self.layers(x)
            return z.movedim(-1, 1) if class_dim == 1 else z

    model = Tokens()
    x, y = constant_predictions(model.layers, 12).view(4, 3, 7), INDICES.view(4, 3)
    likelihood = kf.Categorical(WEIGHT, -100, 0.1, reduction, class_dim)
    check(ggn_errors(model, likelihood, x, y), 2)
    garbage = x.clone()
    garbage[y == -100] = 1e3 * draw(2, 7, seed=9)
    found, clean = (kf.estimate(model, likelihood, (v, y), source="exact") for v in (garbage, x))
    assert relative(found.to_dense(), clean.to_dense()) <= 1e-12


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("boolean", [True, False])
def test_masked_positions_of_elementwise_losses(reduction: str, boolean: bool) -> None:
    """A term for each output of each position: the mask of positions reaches the rows all the same."""
    mask = (BOOL_MASK if boolean else FLOAT_MASK).view(4, 3)
    tokens = mlp(4, 5, 2)
    check(ggn_errors(tokens, kf.Gaussian(0.7, reduction), draw(4, 3, 4), (draw(4, 3, 2), mask)), 2)
    image = double(nn.Sequential(nn.Conv1d(4, 5, 1), nn.Conv1d(5, 2, 1)))
    spread = mask.unsqueeze(1).expand(4, 2, 3)
    check(ggn_errors(image, kf.Gaussian(0.7, reduction), draw(4, 4, 3), (draw(4, 2, 3), spread)), 2)


def test_convolutions_reduce_exactly_under_global_pooling() -> None:
    """A linear convolution whose positions are averaged."""
    model = double(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)))
    check(ggn_errors(model, kf.Gaussian(), draw(6, 2, 4, 5), draw(6, 2), sharing="reduce"), 2)


# ------------------------------------------------------------------------------------------ embeddings, norms
@pytest.mark.parametrize("padding", [None, 1])
def test_embeddings_of_linear_networks(padding: int | None) -> None:
    """The input factor is a diagonal of frequencies; rows that were never seen are zero."""
    model = double(nn.Sequential(nn.Embedding(6, 3, padding_idx=padding), nn.Linear(3, 2)))
    x = torch.randint(5, (7, 4), generator=torch.Generator().manual_seed(0))
    curvature = kf.estimate(model, kf.Gaussian(0.5), (x, draw(7, 4, 2)), source="exact")
    check(block_errors(curvature, model, kf.reference.ggn(model, kf.Gaussian(0.5), x, draw(7, 4, 2))), 2)
    block = curvature.blocks["0"]
    assert isinstance(block, DiagonalKronecker)
    assert block.tensors()["input"].shape == (6,)
    assert block.tensors()["input"][5] == 0
    assert (block.tensors()["input"][1] == 0) == (padding == 1)


def test_embeddings_with_ignored_tokens() -> None:
    model = double(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3)))
    with torch.no_grad():
        model[1].weight.zero_()
    x, y = torch.randint(5, (4, 3), generator=torch.Generator().manual_seed(0)), INDICES.view(4, 3)
    likelihood = kf.Categorical(ignore_index=-100, class_dim=-1)
    errors = ggn_errors_of(model, likelihood, x, y, "1")
    assert errors <= TOLERANCE
    counts = torch.bincount(x[y != -100], minlength=5).double()
    found = kf.estimate(model, likelihood, (x, y), source="exact").blocks["0"].tensors()["input"]
    torch.testing.assert_close(found, counts / counts.sum())


def ggn_errors_of(model: nn.Module, likelihood: kf.Likelihood, x: Tensor, y: Tensor, layer: str) -> float:
    """Of the last layer's own block: constant predictions make it a product."""
    curvature = kf.estimate(model, likelihood, (x, y), source="exact")
    dense = kf.reference.ggn(model, likelihood, x, y)
    place = positions(model, curvature.layouts[layer]).flatten()
    return relative(curvature.blocks[layer].to_dense(), dense[place][:, place])


@pytest.mark.parametrize("norm", ["unitwise", "full"])
@pytest.mark.parametrize("approximation", ["kfac", "dense", "diagonal"])
@pytest.mark.parametrize("name", NORMS)
def test_norms_have_exact_blocks(name: str, approximation: str, norm: str) -> None:
    case = CASES[name]
    module = case.module()
    size = math.prod(case.shape[1:])
    model = nn.Sequential(module, nn.Tanh(), nn.Flatten(), double(nn.Linear(size, 3)).requires_grad_(False))
    x, y = case.input(), torch.randint(3, case.shape[:1], generator=torch.Generator().manual_seed(0))
    likelihood = kf.Categorical(WEIGHT)
    curvature = kf.estimate(model, likelihood, (x, y), source="exact", approximation=approximation, norm=norm)
    dense = kf.reference.ggn(model, likelihood, x, y)
    if approximation == "diagonal":
        assert isinstance(curvature.blocks["0"], Diagonal)
        assert relative(curvature.to_dense(), dense.diag().diag()) <= TOLERANCE
    else:
        assert isinstance(curvature.blocks["0"], Dense)
        check(block_errors(curvature, model, dense), 1)
        if norm == "full":
            assert relative(curvature.to_dense(), dense) <= TOLERANCE


# ------------------------------------------------------------------------------------------ dense and diagonal
def behind_every_layer(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The layer, an activation and a projection; several data and positions, so that KFAC is not exact."""
    case = CASES[name]
    module, x = case.module(), case.input()
    size = module(x)[0].numel()
    model = nn.Sequential(module, nn.Tanh(), nn.Flatten(), double(nn.Linear(size, 3), seed=3))
    return model, x, torch.randint(3, x.shape[:1], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("source", ["exact", "empirical"])
@pytest.mark.parametrize("name", CASES)
def test_dense_blocks_and_diagonals_are_exact(name: str, source: str) -> None:
    model, x, y = behind_every_layer(name)
    likelihood = kf.Categorical(WEIGHT, label_smoothing=0.1)
    oracle = kf.reference.ggn if source == "exact" else kf.reference.empirical_fisher
    wanted = oracle(model, likelihood, x, y)
    dense = kf.estimate(model, likelihood, (x, y), source=source, approximation="dense")
    check(block_errors(dense, model, wanted), 2)
    diagonal = kf.estimate(model, likelihood, (x, y), source=source, approximation="diagonal")
    assert relative(diagonal.to_dense(), wanted.diag().diag()) <= TOLERANCE
    assert all(isinstance(block, Diagonal) for block in diagonal.blocks.values())


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("name", ["linear", "conv2d, groups, dilated", "conv transpose 1d", "layer norm"])
@pytest.mark.parametrize("approximation", ["dense", "diagonal"])
def test_frozen_halves_of_layers(name: str, frozen: str, approximation: str) -> None:
    model, x, y = behind_every_layer(name)
    model[0].get_parameter(frozen).requires_grad_(False)
    curvature = kf.estimate(model, kf.Categorical(), (x, y), source="exact", approximation=approximation)
    wanted = kf.reference.ggn(model, kf.Categorical(), x, y)
    assert f"0.{frozen}" not in curvature.parameter_names
    if approximation == "dense":
        check(block_errors(curvature, model, wanted), 2)
    else:
        assert relative(curvature.to_dense(), wanted.diag().diag()) <= TOLERANCE


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_halves_of_layers_under_kfac(frozen: str) -> None:
    model = mlp(4, 5, 2)
    for layer in model:
        layer.get_parameter(frozen).requires_grad_(False)
    check(ggn_errors(model, kf.Gaussian(), draw(9, 4), draw(9, 2)), 2)


def test_kfac_is_not_exact_where_it_should_not_be() -> None:
    """The tests above could not fail if the blocks were dense in disguise."""
    model, x, y = mlp(4, 5, 3, activation=nn.Tanh), draw(9, 4), torch.arange(9) % 3
    curvature = kf.estimate(model, kf.Categorical(), (x, y), source="exact")
    assert all(isinstance(block, Kronecker) for block in curvature.blocks.values())
    assert min(block_errors(curvature, model, kf.reference.ggn(model, kf.Categorical(), x, y)).values()) > 1e-3


@pytest.mark.parametrize("likelihood", [kf.Categorical(), kf.Bernoulli(), kf.Gaussian(0.3)])
def test_the_ggn_is_the_fisher(likelihood: kf.Likelihood) -> None:
    """Two independent definitions: Hessians in the outputs, and enumerated labels."""
    model, x = mlp(4, 5, 3, activation=nn.Tanh), draw(9, 4)
    dense = kf.estimate(model, likelihood, (x, None), source="exact", approximation="dense")
    check(block_errors(dense, model, kf.reference.fisher(model, likelihood, x)), 2)
