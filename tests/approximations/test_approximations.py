"""Statistics, their running means, and the blocks they stand for."""

from __future__ import annotations

import gc
import tracemalloc

import pytest
import torch
from tests.exactness_helpers import double, draw
from torch import Tensor, nn

import kronfac as kf
from kronfac.approximations import APPROXIMATIONS, KFAC, DenseBlocks, DiagonalBlocks, Mean, get_approximation
from kronfac.blocks import Dense, Diagonal, DiagonalKronecker, Kronecker
from kronfac.estimator import Estimator
from kronfac.layers import adapt
from kronfac.sources import Sample
from kronfac.tape import record

NAMES = ["kfac", "tkfac", "ekfac", "dense", "diagonal", "sua", "prong"]


def sample(layer: nn.Module, x: Tensor, g: Tensor | None, **parts: object) -> Sample:
    values = {"weight": 1.0, "denominator": float(len(x)), "batch": len(x), "first": True} | parts
    return Sample(adapt(layer, "layer"), x, g, **values)  # type: ignore[arg-type]


def small() -> nn.Module:
    return double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))


# ---------------------------------------------------------------------------------------------------- running means
def test_a_mean_is_the_ratio_of_sums() -> None:
    mean, parts = Mean(torch.zeros(2, dtype=torch.float64)), [draw(3, 2), draw(5, 2, seed=1)]
    for part in parts:
        mean.total.add_(part.sum(0), alpha=mean.alpha)
        mean.weight += len(part)
    torch.testing.assert_close(mean.value(), torch.cat(parts).mean(0))


@pytest.mark.parametrize("decay", [0.95, 0.5, 0.01, 0.0])
def test_a_decayed_mean_is_bias_corrected(decay: float) -> None:
    """``Σ βᵏ xₖ / Σ βᵏ``: its first value is the first number itself. Small decays pass the point of rescaling."""
    mean, numbers = Mean(torch.zeros(1, dtype=torch.float64)), draw(12)
    for step, number in enumerate(numbers):
        mean.decay(decay)
        mean.total.add_(number, alpha=mean.alpha)
        mean.weight += 1.0
        weights = torch.tensor([decay ** (step - k) for k in range(step + 1)], dtype=torch.float64)
        wanted = (weights * numbers[: step + 1]).sum() / weights.sum()
        torch.testing.assert_close(mean.value()[0], wanted, rtol=1e-12, atol=1e-14)
        assert mean.scale >= 1e-6


def test_the_value_is_a_copy() -> None:
    mean = Mean(torch.ones(2))
    mean.weight = 1.0
    mean.value().zero_()
    assert mean.total.sum() == 2


# ---------------------------------------------------------------------------------------------------- KFAC
def test_factors_by_hand() -> None:
    layer, x, g = nn.Linear(3, 2).double(), draw(4, 5, 3), draw(4, 5, 2, seed=1)
    statistic = KFAC().start(adapt(layer, "layer"))
    assert statistic.empty
    statistic.add(sample(layer, x, g, weight=0.5, denominator=7.0))
    statistic.add(sample(layer, x, 2 * g, weight=0.5, denominator=7.0, first=False))
    assert not statistic.empty
    rows = torch.cat((x, torch.ones(4, 5, 1, dtype=torch.float64)), -1).flatten(0, 1)
    flat = g.flatten(0, 1)
    block = statistic.block()
    assert isinstance(block, Kronecker)
    torch.testing.assert_close(block.input, rows.T @ rows / 20)
    torch.testing.assert_close(block.output, (0.5 + 0.5 * 4) * flat.T @ flat / 7)
    torch.testing.assert_close(block.to_dense(), torch.kron(block.output, block.input))


def test_groups_have_a_pair_of_factors_each() -> None:
    layer, x = nn.Conv2d(4, 6, 3, groups=2).double(), draw(3, 4, 5, 5)
    g = draw(3, 6, 3, 3, seed=1)
    statistic = KFAC().start(adapt(layer, "layer"))
    statistic.add(sample(layer, x, g))
    block = statistic.block()
    assert isinstance(block, Kronecker)
    assert (block.input.shape, block.output.shape) == ((2, 19, 19), (2, 3, 3))
    for group in range(2):
        alone = nn.Conv2d(2, 3, 3).double()
        part = KFAC().start(adapt(alone, "alone"))
        part.add(sample(alone, x[:, 2 * group : 2 * group + 2], g[:, 3 * group : 3 * group + 3]))
        torch.testing.assert_close(part.block().tensors()["input"], block.input[group])
        torch.testing.assert_close(part.block().tensors()["output"], block.output[group])


def test_row_weights_enter_the_input_factor_and_its_count() -> None:
    layer, x, g = nn.Linear(3, 2).double(), draw(4, 3), draw(4, 2, seed=1)
    weights = torch.tensor([[0.0], [2.0], [1.0], [0.5]], dtype=torch.float64)
    statistic = KFAC().start(adapt(layer, "layer"))
    statistic.add(sample(layer, x, g, row_weights=weights))
    rows = torch.cat((x, torch.ones(4, 1, dtype=torch.float64)), -1)
    torch.testing.assert_close(statistic.block().tensors()["input"], rows.T @ (weights * rows) / 3.5)


def test_a_large_vocabulary_never_becomes_a_matrix() -> None:
    """The square of 50 000 would take 20 GB in float64."""
    layer = nn.Embedding(50_000, 2).double()
    statistic = KFAC().start(adapt(layer, "layer"))
    statistic.add(sample(layer, torch.randint(50_000, (8, 5)), draw(8, 5, 2)))
    block = statistic.block()
    assert isinstance(block, DiagonalKronecker)
    assert max(tensor.numel() for tensor in block.tensors().values()) == 50_000
    assert max(mean.total.numel() for mean in statistic.means().values()) == 50_000


def test_statistics_are_float32_at_least() -> None:
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        layer = nn.Linear(3, 2).to(dtype)
        for name in NAMES:
            statistic = get_approximation(name).start(adapt(layer, "layer"))
            statistic.add(sample(layer, draw(4, 3).to(dtype), draw(4, 2).to(dtype)))
            assert {mean.total.dtype for mean in statistic.means().values()} == {wanted}
            assert statistic.block().dtype == wanted


# ---------------------------------------------------------------------------------------------------- dense, diagonal
def test_diagonals_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Conv1d(2, 3, 2).double(), draw(7, 2, 5)
    g = draw(7, 3, 4, seed=1)
    found = []
    for chunk in (1 << 24, 1, 2 * 15):
        monkeypatch.setattr("kronfac.approximations.diagonal.CHUNK", chunk)
        statistic = DiagonalBlocks().start(adapt(layer, "layer"))
        statistic.add(sample(layer, x, g))
        found.append(statistic.block().diagonal())
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_diagonals_hold_few_gradients_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kronfac.approximations.diagonal.CHUNK", 3 * 8)
    layer = nn.Linear(3, 2).double()
    seen: list[int] = []
    adapter = adapt(layer, "layer")
    original = adapter.per_example_gradients
    monkeypatch.setattr(adapter, "per_example_gradients", lambda x, g: (seen.append(len(x)), original(x, g))[1])
    statistic = DiagonalBlocks().start(adapter)
    statistic.add(Sample(adapter, draw(11, 4, 3), draw(11, 4, 2), 1.0, 11.0, 11, True))
    assert seen == [3, 3, 3, 2]
    statistic.add(Sample(adapter, draw(11, 3), draw(11, 2), 1.0, 11.0, 11, True))
    assert len(seen) == 4  # without positions no gradient is made at all


def test_a_dense_block_that_is_too_large_is_refused_before_it_is_made() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"'layer' needs 20100×20100 entries \(1.5 GiB.*'kfac' or 'diagonal'"):
            DenseBlocks().start(adapt(nn.Linear(200, 100), "layer"))
        assert tracemalloc.get_traced_memory()[1] < 1e7
    finally:
        tracemalloc.stop()
        gc.collect()


# ---------------------------------------------------------------------------------------------------- arguments
def test_approximations_by_name_and_as_objects() -> None:
    assert {name: type(get_approximation(name)) for name in APPROXIMATIONS} == APPROXIMATIONS
    own = KFAC()
    assert get_approximation(own) is own
    curvature = kf.estimate(small(), kf.Categorical(), (draw(4, 3), None), approximation=DiagonalBlocks())
    assert all(isinstance(block, Diagonal) for block in curvature.blocks.values())
    curvature = kf.estimate(small(), kf.Categorical(), (draw(4, 3), None), approximation="dense")
    assert all(isinstance(block, Dense) for block in curvature.blocks.values())


def test_unknown_names_and_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"approximation='shampoo' is unknown.*'kfac'"):
        get_approximation("shampoo")
    with pytest.raises(TypeError, match="not int"):
        get_approximation(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["dense", "diagonal", "tkfac"])
def test_pairs_that_a_source_does_not_offer(name: str) -> None:
    with pytest.raises(ValueError, match=f"approximation='{name}' needs paired statistics.*source='forward_only'"):
        Estimator(small(), kf.Categorical(), approximation=name, source="forward_only")


# ---------------------------------------------------------------------------------------------------- not finite
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_never_enters(name: str, value: float) -> None:
    layer, x, g = nn.Linear(3, 2).double(), draw(4, 3), draw(4, 2)
    statistic = get_approximation(name).start(adapt(layer, "layer"))
    statistic.add(sample(layer, x, g))
    before = {key: (mean.total.clone(), mean.weight) for key, mean in statistic.means().items()}
    g[1, 1] = value
    with pytest.raises(FloatingPointError, match="NaN or Inf in the cotangent of layer 'layer'"):
        statistic.add(sample(layer, x, g))
    for key, mean in statistic.means().items():
        assert torch.equal(mean.total, before[key][0])
        assert mean.weight == before[key][1]


@pytest.mark.parametrize("name", NAMES)
def test_an_infinite_input_touches_no_layers_statistics(name: str) -> None:
    """The activation saturates, so that the outputs, and the layers above, are finite."""
    model, x = small(), draw(4, 3)
    estimator = Estimator(model, kf.Categorical(), approximation=name)
    x[0, 0] = torch.inf
    with record(estimator.adaptation.adapters) as tape:
        out = model(x)
    assert out.isfinite().all()
    with pytest.raises(FloatingPointError, match="NaN or Inf in the input of layer '0'"):
        estimator.update(tape, out)
    assert all(statistic.empty for statistic in estimator.statistics.values())


@pytest.mark.parametrize("what", ["input", "cotangent"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_never_enters_a_normalisation_layer(value: float, what: str) -> None:
    layer = nn.BatchNorm2d(3).double()
    x, g = draw(4, 3, 2, 2), draw(4, 3, 2, 2)
    statistic = get_approximation("kfac").start(adapt(layer, "layer"))
    statistic.add(sample(layer, x, g))
    before, weight = statistic.means()["moment"].total.clone(), statistic.means()["moment"].weight
    (x if what == "input" else g)[1, 1, 0, 1] = value
    with pytest.raises(FloatingPointError, match=f"NaN or Inf in the {what} of layer 'layer'"):
        statistic.add(sample(layer, x, g))
    assert torch.equal(statistic.means()["moment"].total, before)
    assert statistic.means()["moment"].weight == weight


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_batch_norm_hands_on_what_is_not_finite_and_is_named_for_it(value: float) -> None:
    """Its input is not looked at itself: the layer behind it, of which every example is spoilt, is."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sigmoid(), nn.Linear(4, 2)).double()
    estimator, x = Estimator(model, kf.Categorical()), draw(5, 3)
    model[0].register_forward_hook(lambda module, inputs, out: out.index_fill(0, torch.tensor([1]), value))
    with record(estimator.adaptation.adapters) as tape:
        out = model(x)
    assert not out.isfinite().any(1).all()
    with pytest.raises(FloatingPointError, match="they first appear in the input of layer '1', after layer '0'"):
        estimator.update(tape, out)
    assert all(statistic.empty for statistic in estimator.statistics.values())


@pytest.mark.parametrize("name", NAMES)
def test_overflow_is_named(name: str) -> None:
    layer = nn.Linear(3, 2)
    statistic = get_approximation(name).start(adapt(layer, "layer"))
    statistic.add(sample(layer, torch.full((4, 3), 1e30), torch.full((4, 2), 1e30)))
    with pytest.raises(FloatingPointError, match="of layer 'layer' overflowed"):
        statistic.block()


@pytest.mark.parametrize("name", NAMES)
def test_a_failing_layer_leaves_the_grad_mode_alone(name: str) -> None:
    """The error is kept alive on purpose: with its traceback it keeps the frames that were running."""
    model = small()
    estimator = Estimator(model, kf.Gaussian(), approximation=name)
    with record(estimator.adaptation.adapters) as tape:
        out = model(draw(4, 3))
    call = tape.calls["2"]
    call.input = torch.full_like(call.input, torch.nan)
    call.version = call.input._version
    with pytest.raises(FloatingPointError, match="layer '2'") as kept:
        estimator.update(tape, out)
    assert torch.is_grad_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(FloatingPointError) as also_kept:
        estimator.update(tape, out)
    assert also_kept.value is not None
    assert not torch.is_autocast_enabled("cpu")
    assert kept.value is not None
