"""SUA's input factor against its definition: the moment of rows of activations that are uncorrelated over locations."""

from __future__ import annotations

import math

import pytest
import torch
from tests.exactness_helpers import double, draw
from tests.layers.layer_cases import CASES
from torch import Tensor, nn

import kronfac as kf
from kronfac.approximations import KFAC, PRONG, SUA, Approximation
from kronfac.blocks import DiagonalKronecker, Kronecker
from kronfac.layers import LayerAdapter, adapt
from kronfac.sources import Sample

CONVOLUTIONS = [name for name in CASES if name.startswith("conv")]
TIGHT = {"rtol": 1e-11, "atol": 1e-11}


def sample(adapter: LayerAdapter, x: Tensor, g: Tensor | None, **parts: object) -> Sample:
    values = {"weight": 1.0, "denominator": float(len(x)), "batch": len(x), "first": True} | parts
    return Sample(adapter, x, g, **values)  # type: ignore[arg-type]


def gathered(approximation: Approximation, layer: nn.Module, x: Tensor, **parts: object) -> Kronecker:
    adapter = adapt(layer, "layer")
    statistic = approximation.start(adapter)
    g = draw(*layer(x).shape, seed=5)
    statistic.add(sample(adapter, x, g, **parts))
    block = statistic.block()
    assert isinstance(block, Kronecker)
    return block


def assumed_moment(x: Tensor, groups: int) -> Tensor:
    """``E[a_{j,t} a_{j',t'}] = Σ(j,j') 1(t = t') + M(j) M(j')`` of all activations of a group, ``[groups, JT, JT]``."""
    count = math.prod(x.shape[2:])
    columns = x.flatten(2).unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2)
    mean = columns.mean(2)
    covariance = columns @ columns.mT / columns.shape[2] - mean.unsqueeze(2) * mean.unsqueeze(1)
    spread = mean.repeat_interleave(count, 1)
    white = torch.stack([torch.kron(part, torch.eye(count, dtype=x.dtype)) for part in covariance])
    return white + spread.unsqueeze(2) * spread.unsqueeze(1)


def expected_factor(layer: nn.Module, x: Tensor) -> Tensor:
    """Mean over positions of ``E[ā āᵀ]``, with the linear map from activations to rows found by expanding a basis."""
    adapter, groups = adapt(layer, "layer"), layer.groups
    size = math.prod(x.shape[1:])
    origin = adapter.expand(torch.zeros(1, *x.shape[1:], dtype=x.dtype))[0]
    basis = adapter.expand(torch.eye(size, dtype=x.dtype).view(size, *x.shape[1:])) - origin
    found = []
    for group, moment in enumerate(assumed_moment(x, groups)):
        own = slice(group * size // groups, (group + 1) * size // groups)
        rows = (basis[own, :, group] if adapter.stack else basis[own]).permute(1, 2, 0)  # [T, d_in, JT]
        ones = origin[:, group] if adapter.stack else origin  # the bias's one, zero elsewhere
        columns = x.flatten(2).transpose(0, 1).flatten(1).mean(1).repeat_interleave(math.prod(x.shape[2:]))
        mean = rows @ columns[own]
        cross = mean.unsqueeze(2) * ones.unsqueeze(1)
        whole = rows @ moment @ rows.mT + cross + cross.mT + ones.unsqueeze(2) * ones.unsqueeze(1)
        found.append(whole.mean(0))
    return torch.stack(found) if adapter.stack else found[0]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_factor_is_its_definition(name: str) -> None:
    layer, x = CASES[name].module(), CASES[name].input() + 0.7
    block = gathered(SUA(), layer, x)
    torch.testing.assert_close(block.input, expected_factor(layer, x), **TIGHT)
    torch.testing.assert_close(block.output, gathered(KFAC(), layer, x).output, **TIGHT)
    assert torch.linalg.eigvalsh(block.input).min() > -1e-12


def uncorrelated(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Examples whose covariance is exactly zero between locations and the same at each, from the rows of Hadamard."""
    channels, size = shape[1], shape[2:]
    rows = torch.ones(1, 1, dtype=torch.float64)
    while len(rows) < channels * math.prod(size) + 1:
        rows = torch.cat((torch.cat((rows, rows), 1), torch.cat((rows, -rows), 1)))
    white = rows[:, 1 : channels * math.prod(size) + 1].view(len(rows), channels, *size)
    mixed = torch.einsum("nc...,cd->nd...", white, draw(channels, channels, seed=seed))
    return mixed + draw(channels, seed=seed + 1).view(-1, *(1 for _ in size))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_it_is_kfc_where_activations_are_spatially_uncorrelated(name: str) -> None:
    layer, x = CASES[name].module(), uncorrelated(CASES[name].shape)
    found, wanted = gathered(SUA(), layer, x), gathered(KFAC(), layer, x)
    torch.testing.assert_close(found.input, wanted.input, **TIGHT)
    torch.testing.assert_close(found.output, wanted.output, **TIGHT)


def test_it_is_not_kfc_where_they_are_correlated() -> None:
    layer, x = nn.Conv2d(2, 3, 3, padding=1).double(), draw(3, 2, 1, 1).expand(3, 2, 5, 5).contiguous()
    found, wanted = gathered(SUA(), layer, x).input, gathered(KFAC(), layer, x).input
    assert (found - wanted).norm() > 0.1 * wanted.norm()
    torch.testing.assert_close(found.diagonal(), wanted.diagonal(), **TIGHT)


@pytest.mark.parametrize("approximation", ["sua", "prong"])
def test_frozen_weight_or_bias(approximation: str) -> None:
    for frozen in ("weight", "bias"):
        layer = double(nn.Conv2d(2, 3, 3, padding=1))
        getattr(layer, frozen).requires_grad_(False)
        model, x = nn.Sequential(layer, nn.Flatten()), draw(4, 2, 4, 4)
        found = kf.estimate(model, kf.Gaussian(), (x, None), approximation=approximation, source="exact").blocks["0"]
        whole = gathered(SUA() if approximation == "sua" else PRONG(), double(nn.Conv2d(2, 3, 3, padding=1)), x).input
        part = whole[-1:, -1:] if frozen == "weight" else whole[:-1, :-1]
        torch.testing.assert_close(found.tensors()["input"], part, **TIGHT)


def mixed_model() -> nn.Module:
    return double(nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(12, 3)))


def test_layers_without_patches_are_those_of_kfac() -> None:
    x = torch.randint(5, (7, 3), generator=torch.Generator().manual_seed(0))
    for source in ("exact", "forward_only"):
        found, wanted = (
            kf.estimate(mixed_model(), kf.Categorical(), (x, None), approximation=name, source=source)
            for name in ("sua", "kfac")
            if not (source == "forward_only" and name == "none")
        )
        assert list(found.blocks) == ["0", "1", "3"]
        for name, block in found.blocks.items():
            assert type(block) is type(wanted.blocks[name])
            torch.testing.assert_close(block.to_dense(), wanted.blocks[name].to_dense(), **TIGHT)


# ---------------------------------------------------------------------------------------------------- running means
@pytest.mark.parametrize("approximation", [SUA(), PRONG(), PRONG(boundaries=True)])
def test_batches_and_decay(approximation: Approximation) -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1).double()
    adapter = adapt(layer, "layer")
    parts = [draw(3, 2, 5, 4), draw(2, 2, 5, 4, seed=1)]
    statistic = approximation.start(adapter)
    for x in parts:
        statistic.add(sample(adapter, x, draw(*layer(x).shape, seed=5)))
    x, g = torch.cat(parts), torch.cat([draw(*layer(x).shape, seed=5) for x in parts])
    whole = approximation.start(adapter)
    whole.add(sample(adapter, x, g))
    torch.testing.assert_close(statistic.block().to_dense(), whole.block().to_dense(), **TIGHT)
    statistic.decay(0.0)
    statistic.add(sample(adapter, parts[0], g[:3]))
    again = approximation.start(adapter)
    again.add(sample(adapter, parts[0], g[:3]))
    torch.testing.assert_close(statistic.block().to_dense(), again.block().to_dense(), **TIGHT)


def test_sizes_may_differ_between_batches() -> None:
    """Spatial homogeneity is over everything seen: shares of positions are weighted by how many there were."""
    layer = nn.Conv1d(1, 1, 3, padding=1).double()
    adapter, statistic = adapt(layer, "layer"), SUA().start(adapt(layer, "layer"))
    parts = [draw(2, 1, 3), draw(1, 1, 6, seed=1)]
    for x in parts:
        statistic.add(sample(adapter, x, draw(*x.shape, seed=5)))
    values = torch.cat([part.flatten() for part in parts])
    mean, variance = values.mean(), values.var(correction=0)
    # Positions: 2 examples of 3 and 1 of 6; tap 0 misses the first of each row, tap 2 the last.
    both = torch.tensor([[9.0, 9.0, 6.0], [9.0, 12.0, 9.0], [6.0, 9.0, 9.0]], dtype=torch.float64) / 12
    wanted = mean.square() * both + variance * both.diagonal().diag()
    block = statistic.block()
    torch.testing.assert_close(block.tensors()["input"][:3, :3], wanted, **TIGHT)
    torch.testing.assert_close(block.tensors()["input"][:3, 3], mean * both.diagonal(), **TIGHT)


@pytest.mark.parametrize("approximation", [SUA(), PRONG()])
@pytest.mark.parametrize("groups", [1, 2])
def test_weights_of_examples(approximation: Approximation, groups: int) -> None:
    """An example of weight two is an example that is there twice."""
    layer, x = nn.Conv2d(2, 2, 3, padding=1, groups=groups).double(), draw(3, 2, 4, 4)
    weights = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)[:, None].expand(3, 16)
    found = gathered(approximation, layer, x, row_weights=weights)
    wanted = gathered(approximation, layer, x[[0, 1, 1]])
    torch.testing.assert_close(found.input, wanted.input, **TIGHT)


def test_weights_of_positions_are_refused() -> None:
    layer, x = nn.Conv2d(2, 2, 3, padding=1).double(), draw(2, 2, 4, 4)
    weights = torch.ones(2, 16, dtype=torch.float64)
    weights[1, 3] = 0.0
    for approximation in (SUA(), PRONG()):
        with pytest.raises(NotImplementedError, match=r"'layer': the loss weights the positions.*'kfac'"):
            gathered(approximation, layer, x, row_weights=weights)


@pytest.mark.parametrize("approximation", ["sua", "prong"])
def test_reduced_weight_sharing_is_refused(approximation: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten()).double()
    with pytest.raises(ValueError, match=r"need sharing='expand', got sharing='reduce'.*'0'"):
        kf.estimate(model, kf.Gaussian(), (draw(2, 2, 4, 4), None), approximation=approximation, sharing="reduce")
    assert "refused" in kf.coverage(model, approximation=approximation, sharing="reduce").uncovered["0.weight"]


# ---------------------------------------------------------------------------------------------------- PRONG
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_prong_has_the_channels_covariance_at_every_tap(name: str) -> None:
    """Equation (130): nothing of the geometry but the number of taps."""
    layer, x = CASES[name].module(), CASES[name].input() + 0.7
    block, groups = gathered(PRONG(), layer, x), layer.groups
    taps, adapter = math.prod(layer.kernel_size), adapt(layer, "layer")
    columns = x.flatten(2).unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2)
    ones, eye = torch.ones(taps, 1, dtype=x.dtype), torch.eye(taps, dtype=x.dtype)
    for group in range(groups):
        mu = columns[group].mean(1, keepdim=True)
        sigma = torch.cov(columns[group], correction=0).reshape(len(mu), len(mu))
        wanted = torch.kron(sigma, eye) + torch.kron(mu @ mu.T, ones @ ones.T)
        if adapter.has_bias:
            side = torch.kron(mu, ones)
            corner = torch.ones(1, 1, dtype=x.dtype)
            wanted = torch.cat((torch.cat((wanted, side), 1), torch.cat((side.T, corner), 1)))
        torch.testing.assert_close(block.input[group] if adapter.stack else block.input, wanted, **TIGHT)


@pytest.mark.parametrize("name", ["conv2d", "conv2d, groups, dilated", "conv transpose 1d", "linear, positions"])
def test_prong_has_white_derivatives_of_the_same_trace(name: str) -> None:
    layer, x = CASES[name].module(), CASES[name].input()
    found, wanted = gathered(PRONG(), layer, x).output, gathered(KFAC(), layer, x).output
    trace = wanted.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    torch.testing.assert_close(found, trace / wanted.shape[-1] * torch.eye(wanted.shape[-1]).double(), **TIGHT)


def test_prong_may_keep_the_boundaries() -> None:
    layer, x = nn.Conv2d(2, 3, 3, padding=1).double(), draw(3, 2, 5, 4)
    kept, dropped, sua = (gathered(kind, layer, x).input for kind in (PRONG(boundaries=True), PRONG(), SUA()))
    torch.testing.assert_close(kept, sua, **TIGHT)
    assert (dropped - sua).norm() > 0.05 * sua.norm()


def test_prong_without_cotangents_has_the_identity() -> None:
    model = double(nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3)))
    curvature = kf.estimate(
        model, kf.Categorical(), (draw(9, 2, 4, 4), None), approximation="prong", source="forward_only"
    )
    torch.testing.assert_close(curvature.blocks["0"].tensors()["output"], torch.eye(2).double().expand(2, 2, 2))
    torch.testing.assert_close(curvature.blocks["2"].tensors()["output"], torch.eye(3).double())


def test_prong_of_other_layers() -> None:
    """K-FAC's input factor; embeddings keep it as a vector, and norms keep their exact blocks."""
    x = torch.randint(5, (7, 3), generator=torch.Generator().manual_seed(0))
    found, wanted = (
        kf.estimate(mixed_model(), kf.Categorical(), (x, None), approximation=name, source="exact")
        for name in ("prong", "kfac")
    )
    for name in ("0", "3"):
        a, b = found.blocks[name].tensors(), wanted.blocks[name].tensors()
        torch.testing.assert_close(a["input"], b["input"], **TIGHT)
        white = b["output"].trace() / len(b["output"]) * torch.eye(len(b["output"])).double()
        torch.testing.assert_close(a["output"], white, **TIGHT)
    assert isinstance(found.blocks["0"], DiagonalKronecker)
    torch.testing.assert_close(found.blocks["1"].to_dense(), wanted.blocks["1"].to_dense(), **TIGHT)


# ---------------------------------------------------------------------------------------------------- consumers
@pytest.mark.parametrize("approximation", ["sua", "prong"])
def test_no_patch_is_ever_unfolded(approximation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("im2col")

    model = double(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten()))
    for place in ("kronfac.layers.conv.im2col", "kronfac.layers.conv_moments.im2col"):
        monkeypatch.setattr(place, refuse)
    curvature = kf.estimate(model, kf.Gaussian(), (draw(3, 2, 4, 4), None), approximation=approximation)
    assert curvature.trace() > 0


@pytest.mark.parametrize("approximation", ["sua", "prong"])
def test_training_lowers_the_loss(approximation: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.randn(32, 1, 4, 4), torch.arange(32) % 3
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.3, damping=1e-2, approximation=approximation)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("approximation", ["sua", "prong"])
def test_blocks_of_other_shapes_with_equal_statistics(approximation: str) -> None:
    """Channel moments say nothing of outputs and bias: layers that are inverted together must agree in these too."""
    model = double(
        nn.Sequential(
            nn.Conv2d(2, 2, 3, padding=1),
            nn.Conv2d(2, 2, 3, padding=1, bias=False),
            nn.Conv2d(2, 4, 3, padding=1),
            nn.Flatten(),
            nn.Linear(64, 3),
        )
    )
    optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1, damping=0.1, approximation=approximation)
    nn.functional.cross_entropy(model(draw(6, 2, 4, 4)), torch.arange(6) % 3).backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = optimizer.curvature().factorise(0.1).apply(gradient)
    optimizer.step()
    moves = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    ratios = [float((moves[name] / wanted[name]).median()) for name in moves]
    for name, move in moves.items():
        torch.testing.assert_close(move, ratios[0] * wanted[name], rtol=1e-6, atol=1e-9)
    assert ratios[0] < 0


@pytest.mark.parametrize("approximation", ["sua", "prong"])
def test_verify_compares_without_asking_for_exact_factors(approximation: str) -> None:
    """The factors are meant to differ from the exact ones; error and cosine say by how much."""
    model = double(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)))
    report = kf.verify(model, kf.Categorical(), (draw(5, 1, 4, 4), None), approximation=approximation, source="exact")
    rows = {row.layer: row for row in report.rows}
    assert 0.0 < rows["0"].cosine < 1.0
    report.raise_if(scale=1e-8)


def test_coverage_says_what_is_assumed() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 3))
    reasons = {}
    for name in ("sua", "prong"):
        rows = {row.parameter: row for row in kf.coverage(model, approximation=name).rows}
        assert (rows["0.weight"].factors, rows["0.weight"].state) == ("10x10 (x) 2x2", "approximate")
        reasons[name] = rows
    assert "activations as uncorrelated over positions but for their mean" in reasons["sua"]["0.weight"].reason
    assert "activations" not in reasons["sua"]["2.weight"].reason
    assert "cotangents as white" in reasons["prong"]["2.weight"].reason
    assert "at borders too" in reasons["prong"]["0.weight"].reason
    kept = kf.coverage(model, approximation=PRONG(boundaries=True)).rows[0].reason
    assert "at borders too" not in kept
