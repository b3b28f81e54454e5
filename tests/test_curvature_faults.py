"""Faults that were found in curvature, its operators and its files, one test each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.exactness_helpers import draw
from torch import Tensor, nn
from torch.nn.utils import prune

import kronfac as kf
from kronfac.approximations import EKFAC, KFAC, KKFAC, TKFAC, XKFAC, Approximation, Limited, TraceMatchedXKFAC
from kronfac.blocks import Kronecker
from kronfac.measuring import frozen_buffers

LABELS = torch.arange(6) % 3


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


# ---------------------------------------------------------------------------------------------------- buffers
@pytest.mark.parametrize("measure", [kf.estimate, kf.verify])
def test_measuring_between_forward_and_backward_leaves_the_backward_as_it_is(measure: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    x = draw(6, 4)
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    loss = model(x).square().sum()
    measure(model, kf.Categorical(), (x, LABELS))
    torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), wanted)


class Buffered(nn.Module):
    """A linear layer times a buffer."""

    scale: Tensor

    def __init__(self, scale: Tensor, write: Callable[[Buffered], object]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()
        self.register_buffer("scale", scale)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self)
        return self.layer(x) * self.scale


def test_an_expanded_buffer_is_put_back() -> None:
    model = Buffered(torch.ones(1, 3, dtype=torch.float64).expand(6, 3), lambda self: self.scale[0].mul_(2))
    kf.estimate(model, kf.Categorical(), (draw(6, 4), LABELS))
    assert model.scale.shape == (6, 3)
    assert bool((model.scale == 1).all())


def test_a_sparse_buffer_serves_a_backward_begun_before_and_is_put_back() -> None:
    sparse = torch.eye(3, dtype=torch.float64).to_sparse()
    model = nn.Module()
    model.register_buffer("graph", sparse)
    x = draw(3, 2).requires_grad_()
    loss = torch.sparse.mm(sparse, x).sum()
    with frozen_buffers(model):
        pass
    loss.backward()
    with frozen_buffers(model):
        sparse.mul_(2)
    assert torch.equal(sparse.to_dense(), torch.eye(3, dtype=torch.float64))


def test_a_buffer_that_is_replaced_comes_back_itself() -> None:
    def grow(self: Buffered) -> None:
        self.scale = torch.cat((self.scale[:1], self.scale)) * 2

    model = Buffered(torch.ones(1, 3, dtype=torch.float64), grow)
    before = model.scale
    with frozen_buffers(model):
        grow(model)
        assert model.scale.shape == (2, 3)
    assert model.scale is before
    assert bool((before == 1).all())


# ---------------------------------------------------------------------------------------------------- reduce
class Pooled(nn.Module):
    """A linear layer over positions, whose input has the batch first or not, and their mean."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.inner, self.outer, self.order = nn.Linear(4, 6).double(), nn.Linear(6, 3).double(), order

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "batch":
            return self.outer(self.inner(x).mean(1))
        if self.order == "sequence":
            return self.outer(self.inner(x.transpose(0, 1)).mean(0))
        return self.outer(self.inner(x.flatten(0, 1)).unflatten(0, (len(x), -1)).mean(1))


@pytest.mark.parametrize("order", ["sequence", "flat"])
def test_reduce_refuses_a_layer_without_the_batch_in_front(order: str) -> None:
    data = draw(5, 4, 4), draw(5, 3)
    with pytest.raises(ValueError, match=r"sharing='reduce' needs .*layer 'inner'.* or use sharing='expand'"):
        kf.estimate(Pooled(order), kf.Gaussian(), data, sharing="reduce")
    kf.estimate(Pooled(order), kf.Gaussian(), data)
    kf.estimate(Pooled("batch"), kf.Gaussian(), data, sharing="reduce")


# ---------------------------------------------------------------------------------------------------- inference mode
def ones(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.ones_like(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "compute",
    [
        lambda m, x: kf.GaussNewtonOperator(m, kf.Categorical(), (x, LABELS)).quadratic_form(ones(m)),
        lambda m, x: kf.GaussNewtonOperator(m, kf.Categorical(), (x, LABELS)).trace(2),
        lambda m, x: kf.GaussNewtonOperator(m, kf.Categorical(), (x, LABELS)).matmul(ones(m)),
        lambda m, x: kf.HessianOperator(m, kf.Categorical(), (x, LABELS)).matmul(ones(m)),
        lambda m, x: kf.operators.ggn_quadratic_form(m, kf.Categorical(), x, ones(m)),
        lambda m, x: kf.operators.ggn_gram(m, kf.Categorical(), x, [ones(m), ones(m)]),
        lambda m, x: kf.estimate(m, kf.Categorical(), (x, LABELS)),
        lambda m, x: kf.verify(m, kf.Categorical(), (x, LABELS)),
    ],
)
def test_inference_mode_is_refused_by_name(compute: Callable[[nn.Module, Tensor], Any]) -> None:
    model, x = mlp(), draw(6, 4)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch\.inference_mode\(\) does not allow"):
        compute(model, x)
    with torch.no_grad():
        compute(model, x)


# ---------------------------------------------------------------------------------------------------- files
def _pooled(layer: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)).double()


def _without_adapters(path: Path) -> None:
    """Make a file what it was before adapters were named in it."""
    tensors, content = kf.storage.read_file(path, "kronfac.curvature", "curvature")
    for entry in content["layers"]:
        assert entry.pop("adapter")
    kf.storage.write_file(path, tensors, content, "kronfac.curvature")


@pytest.mark.parametrize("old", [False, True])
def test_loading_refuses_other_groups(tmp_path: Path, old: bool) -> None:
    pytest.importorskip("safetensors.torch")
    saved, other = _pooled(nn.Conv2d(4, 6, 3, groups=2), 6), _pooled(nn.Conv2d(2, 6, 3), 6)
    path = tmp_path / "curvature.safetensors"
    kf.save(kf.estimate(saved, kf.Categorical(), (draw(6, 4, 6, 6), LABELS)), path)
    if old:
        _without_adapters(path)
    with pytest.raises(kf.storage.StorageError, match=r"shape \[2, 3, 19\] for layer '0', the model's layer has \[6"):
        kf.load(path, other)
    kf.load(path, saved)


@pytest.mark.parametrize(
    ("saved", "other", "x"),
    [
        (_pooled(nn.Conv2d(4, 4, 3), 4), _pooled(nn.ConvTranspose2d(4, 4, 3), 4), draw(6, 4, 6, 6)),
        (
            nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 3)).double(),
            nn.Sequential(nn.Embedding(5, 5), nn.Linear(5, 3)).double(),
            draw(6, 5),
        ),
    ],
)
def test_loading_refuses_a_layer_of_another_kind(saved: nn.Module, other: nn.Module, x: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("safetensors.torch")
    path = tmp_path / "curvature.safetensors"
    kf.save(kf.estimate(saved, kf.Categorical(), (x, LABELS), approximation="dense"), path)
    with pytest.raises(kf.storage.StorageError, match="a layer '0' of another kind"):
        kf.load(path, other)
    kf.load(path, saved)


# ---------------------------------------------------------------------------------------------------- layers
@pytest.mark.parametrize(
    "change",
    [nn.utils.weight_norm, nn.utils.spectral_norm, lambda layer: prune.l1_unstructured(layer, "weight", 2)],
)
@pytest.mark.parametrize("layer", [nn.Linear(4, 4, bias=False), nn.Conv1d(4, 4, 1, bias=False), nn.RMSNorm(4)])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_layer_whose_only_weight_is_computed_is_uncovered(
    layer: nn.Module, change: Callable[[nn.Module], nn.Module]
) -> None:
    model = nn.Sequential(change(copy.deepcopy(layer)), nn.Linear(4, 3))
    adaptation = kf.layers.adapt_model(model)
    assert list(adaptation.adapters) == ["1"]
    assert set(adaptation.uncovered) == {name for name, _ in model.named_parameters() if name.startswith("0.")}
    assert all("computed from other parameters" in reason for reason in adaptation.uncovered.values())
    assert "computed from other parameters" in str(kf.coverage(model))


def test_a_model_without_parameters_is_refused_as_by_coverage() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        kf.estimate(nn.ReLU(), kf.Categorical(), (draw(6, 3), LABELS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_running_statistics_in_16_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 5, 1), nn.BatchNorm1d(5), nn.Flatten(), nn.Linear(10, 3)).eval()
    x = draw(6, 4, 2).float()
    found = kf.estimate(model.to(dtype), kf.Categorical(), (x.to(dtype), LABELS), source="exact").blocks["1"]
    wanted = kf.estimate(model.float(), kf.Categorical(), (x, LABELS), source="exact").blocks["1"]
    torch.testing.assert_close(found.to_dense(), wanted.to_dense(), rtol=0.1, atol=2e-3)


# ---------------------------------------------------------------------------------------------------- nothing counts
@pytest.mark.parametrize("approximation", ["kfac", "ekfac", "kfac_tridiagonal"])
@pytest.mark.parametrize("reduction", ["sum", "batchmean"])
def test_data_of_which_nothing_counts_are_refused_as_such(approximation: str, reduction: str) -> None:
    likelihood = kf.Categorical(ignore_index=-1, reduction=reduction)
    none = draw(6, 4), torch.full((6,), -1)
    with pytest.raises(ValueError, match=r"\['0', '2'\]: every target is ignored"):
        kf.estimate(mlp(), likelihood, none, approximation=approximation)
    kf.estimate(mlp(), likelihood, [none, (draw(6, 4), LABELS)], approximation=approximation)


@pytest.mark.parametrize("part", [XKFAC(), TraceMatchedXKFAC(), KKFAC()])
def test_parts_that_read_the_whole_graph_are_refused(part: Approximation) -> None:
    with pytest.raises(TypeError, match="layers one by one"):
        EKFAC(part)
    for where in ("base", "wide"):
        with pytest.raises((TypeError, ValueError), match=r"layers one by one|can leave none out"):
            kf.estimate(mlp(), kf.Categorical(), (draw(6, 4), LABELS), approximation=Limited(5, **{where: part}))
    EKFAC(TKFAC())
    Limited(4, base=EKFAC(KFAC()))


def test_the_nearest_product_is_not_held_to_the_trace() -> None:
    report = kf.verify(mlp(), kf.Categorical(), (draw(6, 4), LABELS), approximation="nearest_kronecker")
    report.raise_if(scale=1e-6)
    assert all(row.trace_factor is None for row in report.rows)


# ---------------------------------------------------------------------------------------------------- masks
@pytest.mark.parametrize("approximation", ["kfac", "ekfac", "sua", "prong", "kfac_tridiagonal", "tkfac", "dense"])
def test_a_mask_of_ones_in_one_of_two_batches_is_no_mask(approximation: str) -> None:
    x1, x2, y = draw(6, 4, seed=1), 3 * draw(6, 4, seed=2), draw(6, 3)
    masked = y, torch.ones(6, 3, dtype=torch.float64)

    def dense(first: Any, second: Any) -> Tensor:
        data = [(x1, first), (x2, second)]
        return kf.estimate(mlp(), kf.Gaussian(), data, source="exact", approximation=approximation).to_dense()

    wanted = dense(y, y)
    torch.testing.assert_close(dense(y, masked), wanted)
    torch.testing.assert_close(dense(masked, masked), wanted)


def test_masks_count_terms_in_a_unit_that_other_batches_share() -> None:
    """Half of the terms of each example masked: its rows count half of what those of a batch without a mask do."""
    x1, x2 = draw(6, 4, seed=1), 3 * draw(6, 4, seed=2)
    y, mask = torch.zeros(6, 4, dtype=torch.float64), torch.tensor([1.0, 1.0, 0.0, 0.0]).double().expand(6, 4)
    model = nn.Linear(4, 4, bias=False).double()
    block = kf.estimate(model, kf.Gaussian(), [(x1, y), (x2, (y, mask))], source="exact").blocks[""]
    assert isinstance(block, Kronecker)
    torch.testing.assert_close(block.input, (x1.T @ x1 + x2.T @ x2 / 2) / 9)


# ---------------------------------------------------------------------------------------------------- pairs
class Two(nn.Module):
    """A model of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.layer(a + 2 * b)


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("targets", [LABELS, None])
def test_a_single_pair_of_several_inputs_and_targets_is_one_batch(kind: type, targets: Tensor | None) -> None:
    model, inputs = Two(), kind((draw(6, 4, seed=1), draw(6, 4, seed=2)))
    found = kf.estimate(model, kf.Categorical(), kind((inputs, targets)), source="exact")
    wanted = kf.estimate(model, kf.Categorical(), [(inputs, targets)], source="exact")
    assert torch.equal(found.to_dense(), wanted.to_dense())


@pytest.mark.parametrize("kind", [tuple, list])
def test_two_pairs_are_two_batches(kind: type) -> None:
    model, pairs = mlp(), [(draw(6, 4, seed=s), LABELS) for s in (1, 2)]
    found = kf.estimate(model, kf.Categorical(), kind(pairs), source="exact").to_dense()
    whole = torch.cat([x for x, _ in pairs]), torch.cat([LABELS, LABELS])
    torch.testing.assert_close(found, kf.estimate(model, kf.Categorical(), whole, source="exact").to_dense())


# ---------------------------------------------------------------------------------------------------- dtypes
def test_layers_of_two_dtypes_are_named() -> None:
    class Widen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.double()

    model = nn.Sequential(nn.Linear(4, 3), Widen(), nn.Linear(3, 3).double())
    with pytest.raises(TypeError, match=r"float32 \(layer '0'\) and torch.float64 \(layer '2'\)"):
        kf.estimate(model, kf.Categorical(), (draw(6, 4).float(), LABELS))
