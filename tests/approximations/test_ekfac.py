"""EKFAC against the oracle: K-FAC's basis, the exact diagonal in it, and never farther from the exact block."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.blocks.block_cases import random_psd
from tests.exactness_helpers import block_errors, double, draw, ggn_errors, positions, relative, seeded
from tests.layers.layer_cases import CASES, NORMS
from torch import Tensor, nn

import kronfac as kf
from kronfac.approximations import EKFAC, KFAC, DiagonalBlocks
from kronfac.approximations.ekfac import EKFACStatistic
from kronfac.approximations.kfac import KFACStatistic
from kronfac.blocks import Block, Dense, DiagonalKronecker, EigenKronecker, Kronecker
from kronfac.estimator import Estimator
from kronfac.layers import LayerAdapter, adapt
from kronfac.sources import Sample
from kronfac.tape import record

LAYERS = [name for name in CASES if name not in NORMS]
WEIGHT = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)


def behind(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The layer, an activation and a projection; several data and positions, so that K-FAC is not exact."""
    case = CASES[name]
    module, x = case.module(), case.input()
    model = nn.Sequential(module, nn.Tanh(), nn.Flatten(), double(nn.Linear(module(x)[0].numel(), 3), seed=3))
    return model, x, torch.randint(3, x.shape[:1], generator=seeded())


def exact_parts(model: nn.Module, adapter: LayerAdapter, dense: Tensor) -> Tensor:
    """The oracle's block of each stack element, ``[*stack, n, n]``."""
    places = positions(model, adapter).reshape(-1, adapter.d_out * adapter.d_in)
    return torch.stack([dense[place][:, place] for place in places]).reshape(*adapter.stack, *places.shape[-1:] * 2)


def vectors(block: EigenKronecker) -> Tensor:
    """``Q_G ⊗ Q_A`` of each stack element."""
    eye = torch.eye(block.shape[-1], dtype=torch.float64).expand(*block.shape[:-2], -1, -1)
    return Kronecker(eye if block.input is None else block.input, block.output).matrices()


def off_diagonal(matrix: Tensor) -> float:
    rest = matrix - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))
    return float(rest.norm() / matrix.norm())


# ---------------------------------------------------------------------------------------------------- the formula
@pytest.mark.parametrize("source", ["exact", "empirical"])
@pytest.mark.parametrize(
    ("name", "sharing"), [(n, s) for n in LAYERS for s in ("expand", "reduce") if s == "expand" or "embedding" not in n]
)
def test_values_are_the_exact_diagonal_in_the_basis_of_the_factors(name: str, sharing: str, source: str) -> None:
    model, x, y = behind(name)
    likelihood = kf.Categorical(WEIGHT, label_smoothing=0.1)
    oracle = kf.reference.ggn if source == "exact" else kf.reference.empirical_fisher
    wanted = oracle(model, likelihood, x, y)
    options = {"source": source, "sharing": sharing}
    found = kf.estimate(model, likelihood, (x, y), approximation="ekfac", **options)
    factors = kf.estimate(model, likelihood, (x, y), approximation="kfac", **options)
    assert list(found.blocks) == ["0", "3"]
    for layer, block in found.blocks.items():
        assert isinstance(block, EigenKronecker)
        adapter, factor = found.layouts[layer], factors.blocks[layer]
        assert isinstance(adapter, LayerAdapter)
        q = vectors(block)
        eye = torch.eye(q.shape[-1], dtype=torch.float64).expand_as(q)
        torch.testing.assert_close(q.mT @ q, eye, rtol=0, atol=1e-12)
        assert off_diagonal(block.output.mT @ factor.tensors()["output"] @ block.output) < 1e-10
        if isinstance(factor, DiagonalKronecker):
            assert block.input is None
        else:
            assert block.input is not None
            assert off_diagonal(block.input.mT @ factor.tensors()["input"] @ block.input) < 1e-10
        diagonal = (q.mT @ exact_parts(model, adapter, wanted) @ q).diagonal(dim1=-2, dim2=-1)
        assert relative(block.values.flatten(-2), diagonal) < 1e-10


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("name", ["linear", "linear, positions", "conv2d, groups, dilated", "conv transpose 1d"])
def test_frozen_halves_of_layers(name: str, frozen: str) -> None:
    model, x, y = behind(name)
    model[0].get_parameter(frozen).requires_grad_(False)
    found = kf.estimate(model, kf.Categorical(), (x, y), source="exact", approximation="ekfac")
    block, adapter = found.blocks["0"], found.layouts["0"]
    assert isinstance(block, EigenKronecker)
    assert isinstance(adapter, LayerAdapter)
    q, exact = vectors(block), exact_parts(model, adapter, kf.reference.ggn(model, kf.Categorical(), x, y))
    assert relative(block.values.flatten(-2), (q.mT @ exact @ q).diagonal(dim1=-2, dim2=-1)) < 1e-10


@pytest.mark.parametrize("shape", ["narrow", "wide", "output wide", "input wide"])
def test_either_side_may_be_projected_first(shape: str) -> None:
    """Positions below and above the widths choose where each projection takes place."""
    d_in, d_out = {"narrow": (2, 2), "wide": (9, 8), "output wide": (2, 9), "input wide": (9, 2)}[shape]
    model = double(nn.Sequential(nn.Linear(d_in, d_out), nn.Tanh(), nn.Flatten(), nn.Linear(5 * d_out, 3)))
    x, y = draw(6, 5, d_in), torch.arange(6) % 3
    found = kf.estimate(model, kf.Categorical(), (x, y), source="exact", approximation="ekfac").blocks["0"]
    exact = kf.estimate(model, kf.Categorical(), (x, y), source="exact", approximation="dense").blocks["0"]
    assert isinstance(found, EigenKronecker)
    q = vectors(found)
    assert relative(found.values.flatten(-2), (q.mT @ exact.matrices() @ q).diagonal()) < 1e-10


def test_batches_add_up_to_the_whole_data_set() -> None:
    model, x, y = behind("conv2d")
    x, y = draw(7, *x.shape[1:]), torch.arange(7) % 3
    for reduction in ("mean", "sum"):
        likelihood = kf.Categorical(reduction=reduction)
        loader = list(zip(x.split([2, 4, 1]), y.split([2, 4, 1]), strict=True))
        parts = kf.estimate(model, likelihood, loader, source="exact", approximation="ekfac")
        whole = kf.estimate(model, likelihood, (x, y), source="exact", approximation="ekfac")
        assert relative(parts.to_dense(), whole.to_dense()) < 1e-9


def test_norms_keep_their_exact_blocks() -> None:
    model = double(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)))
    x, y = draw(5, 3), torch.arange(5) % 3
    for norm in ("unitwise", "full"):
        curvature = kf.estimate(model, kf.Categorical(), (x, y), source="exact", approximation="ekfac", norm=norm)
        assert isinstance(curvature.blocks["1"], Dense)
        errors = block_errors(curvature, model, kf.reference.ggn(model, kf.Categorical(), x, y))
        assert errors["1"] < 1e-10


# ---------------------------------------------------------------------------------------------------- never farther off
class Pooled(nn.Module):
    """A net over sequences, averaged at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(1)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).tanh().mean(1))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), (9, 4)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 3, 2), nn.Flatten(), nn.Linear(3, 3)
        ),
        (7, 2, 4, 4),
    ),
    "groups": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, groups=2),
            nn.Tanh(),
            nn.Conv2d(4, 4, 2, groups=4),
            nn.Flatten(),
            nn.Linear(16, 3),
        ),
        (7, 4, 3, 3),
    ),
    "sequences": (Pooled, (6, 7, 3)),
    "words": (Words, (8, 5)),
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("name", "sharing"), [(n, s) for n in NETS for s in ("expand", "reduce") if (n, s) != ("words", "reduce")]
)
def test_it_is_never_farther_from_the_exact_block_than_kfac(name: str, sharing: str, seed: int) -> None:
    make, shape = NETS[name]
    model = double(make(), seed=seed, scale=1.0)
    x = torch.randint(6, shape, generator=seeded(seed)) if name == "words" else draw(*shape, seed=seed + 20)
    y = torch.randint(3, shape[:1], generator=seeded(seed))
    exact = kf.reference.ggn(model, kf.Categorical(), x, y)
    options = {"source": "exact", "sharing": sharing}
    found, plain = (
        block_errors(kf.estimate(model, kf.Categorical(), (x, y), approximation=kind, **options), model, exact)
        for kind in ("ekfac", "kfac")
    )
    assert all(found[layer] <= plain[layer] * (1 + 1e-12) for layer in plain)
    assert sum(found.values()) < 0.99 * sum(plain.values())


# ---------------------------------------------------------------------------------------------------- both exact
def test_deep_linear_networks() -> None:
    model = double(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2)))
    for reduction in ("mean", "batchmean", "sum"):
        errors = ggn_errors(model, kf.Gaussian(0.7, reduction), draw(20, 4), draw(20, 2), approximation="ekfac")
        assert max(errors.values()) < 1e-8


def test_token_wise_deep_linear_networks() -> None:
    """Only without correlation between tokens: EKFAC sees those that K-FAC leaves out, here there is one token."""
    model = double(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)))
    errors = ggn_errors(model, kf.Gaussian(), draw(6, 1, 4), draw(6, 1, 2), approximation="ekfac")
    assert max(errors.values()) < 1e-8


@pytest.mark.parametrize("likelihood", [kf.Categorical(WEIGHT, label_smoothing=0.2), kf.Bernoulli(), kf.Gaussian(0.3)])
def test_one_datum(likelihood: kf.Likelihood) -> None:
    model = double(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    y = torch.tensor([1]) if isinstance(likelihood, kf.Categorical) else draw(1, 3).sigmoid()
    assert max(ggn_errors(model, likelihood, draw(1, 4), y, approximation="ekfac").values()) < 1e-8


def test_convolutions_onto_one_position() -> None:
    conv = nn.Conv2d(2, 4, 3, groups=2)
    model = double(nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)))
    assert max(ggn_errors(model, kf.Categorical(), draw(1, 2, 3, 3), None, approximation="ekfac").values()) < 1e-8


# ---------------------------------------------------------------------------------------------------- two passes
def small() -> nn.Module:
    return double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))


LABELS = torch.arange(12) % 3


def pairs() -> list[tuple[Tensor, Tensor]]:
    return list(zip(draw(12, 3).split((5, 4, 3)), LABELS.split((5, 4, 3)), strict=True))


def test_every_form_of_data_that_can_be_read_twice() -> None:
    model, x = small(), draw(12, 3)
    dataset = torch.utils.data.TensorDataset(x, LABELS)
    options = {"source": "exact", "approximation": "ekfac"}
    wanted = kf.estimate(model, kf.Categorical(), (x, LABELS), **options).to_dense()
    for loader in ([x, LABELS], pairs(), torch.utils.data.DataLoader(dataset, batch_size=5)):
        assert relative(kf.estimate(model, kf.Categorical(), loader, **options).to_dense(), wanted) < 1e-10


def test_data_that_can_be_read_once_is_refused() -> None:
    for loader in (iter(pairs()), (pair for pair in pairs()), map(tuple, pairs())):
        with pytest.raises(
            ValueError, match=r"'ekfac' reads the data 2 times.*can be read once; pass a list of pairs or"
        ):
            kf.estimate(small(), kf.Categorical(), loader, approximation="ekfac")

    class Once:
        def __init__(self, later: int) -> None:
            self.rest = [pairs(), pairs()[:later]]

        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter(self.rest.pop(0))

    for later in (0, 1):
        with pytest.raises(ValueError, match=f"gave 3 batches first and {later} afterwards; pass a list"):
            kf.estimate(small(), kf.Categorical(), Once(later), approximation="ekfac")
    with pytest.raises(ValueError, match="loader is empty"):
        kf.estimate(small(), kf.Categorical(), [], approximation="ekfac")


def test_seeds_decide_and_each_pass_draws_labels_of_its_own() -> None:
    model = small()
    found = [kf.estimate(model, kf.Categorical(), pairs(), approximation="ekfac", seed=s) for s in (0, 0, 1, 2**62, -3)]
    assert torch.equal(found[0].to_dense(), found[1].to_dense())
    assert not torch.equal(found[0].to_dense(), found[2].to_dense())
    # The trace is the mean squared gradient: that of the second pass's labels, not of the first's.
    first = kf.estimate(model, kf.Categorical(), pairs(), approximation="dense", seed=0)
    assert abs(float(found[0].trace() - first.trace())) > 1e-6 * float(first.trace())


def test_sampled_values_are_unbiased() -> None:
    model = small()
    wanted = kf.estimate(model, kf.Categorical(), pairs(), approximation="dense", source="exact").trace()
    traces = torch.stack(
        [kf.estimate(model, kf.Categorical(), pairs(), approximation="ekfac", seed=seed).trace() for seed in range(100)]
    )
    assert abs(float(traces.mean() - wanted)) < 4 * float(traces.std()) / math.sqrt(len(traces))
    several = [
        kf.estimate(model, kf.Categorical(), pairs(), approximation="ekfac", samples=50, seed=s) for s in range(4)
    ]
    errors = [abs(float(curvature.trace() / wanted) - 1) for curvature in several]
    assert max(errors) < 4 * float(traces.std() / wanted) / math.sqrt(50)


def test_files_keep_it_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    for name in ("linear", "conv2d, groups, dilated", "embedding"):
        model, x, y = behind(name)
        curvature = kf.estimate(model, kf.Categorical(), (x, y), approximation="ekfac")
        kf.save(curvature, tmp_path / "curvature.safetensors")
        again = kf.load(tmp_path / "curvature.safetensors", model)
        assert all(isinstance(block, EigenKronecker) for block in again.blocks.values())
        assert torch.equal(again.to_dense(), curvature.to_dense())


# ---------------------------------------------------------------------------------------------------- running averages
def statistic(module: nn.Module) -> EKFACStatistic:
    found = EKFAC().start(adapt(module, "layer"))
    assert isinstance(found, EKFACStatistic)
    return found


def sample(owner: EKFACStatistic, x: Tensor, g: Tensor) -> Sample:
    return Sample(owner.layer, x, g, 1.0, float(len(x)), len(x), True)


def same(found: Block, wanted: Block) -> None:
    assert relative(found.to_dense(), wanted.to_dense()) < 1e-10


def test_before_and_right_after_the_first_basis_it_is_the_kronecker_product() -> None:
    layer = nn.Conv1d(2, 3, 2).double()
    own, plain = statistic(layer), KFAC().start(adapt(layer, "layer"))
    assert own.empty
    assert own.constants() == {}
    for seed in range(3):
        data = sample(own, draw(7, 2, 5, seed=seed), draw(7, 3, 4, seed=seed + 9))
        own.decay(0.8)
        plain.decay(0.8)
        own.add(data)
        plain.add(data)
    assert not own.empty
    same(own.block(), plain.block())
    own.rebase()
    assert {key: tensor.shape for key, tensor in own.constants().items()} == own.constant_shapes()
    same(own.block(), plain.block())


def test_running_values_are_bias_corrected_averages_in_the_present_basis() -> None:
    layer, ema = nn.Linear(3, 2).double(), 0.7
    own, plain = statistic(layer), KFAC().start(adapt(layer, "layer"))
    data = [sample(own, draw(n, 3, seed=n), draw(n, 2, seed=n + 9)) for n in (5, 4, 3)]
    own.add(data[0])
    plain.add(data[0])
    own.rebase()
    basis = own.constants()
    parts, weights = [plain.block().eigh().values], torch.tensor([5 * ema**2, 4 * ema, 3.0], dtype=torch.float64)
    for pull in data[1:]:
        own.decay(ema)
        own.add(pull)
        assert pull.cotangents is not None
        gradients = own.layer.per_example_gradients(pull.inputs, pull.cotangents)
        parts.append((basis["output"].mT @ gradients @ basis["input"]).square().mean(0))
    wanted = sum(weight * part for weight, part in zip(weights / weights.sum(), parts, strict=True))
    block = own.block()
    assert isinstance(block, EigenKronecker)
    assert relative(block.values, wanted) < 1e-12
    assert all(torch.equal(own.constants()[key], basis[key]) for key in basis), "the basis waits for the next refresh"


@pytest.mark.parametrize("name", ["linear", "conv2d, groups, dilated", "embedding"])
def test_a_new_basis_takes_the_diagonal_of_the_old_block(name: str) -> None:
    case = CASES[name]
    module = case.module()
    own, x = statistic(module), case.input()
    g = draw(*module(x).shape, seed=4)
    own.add(sample(own, x, g))
    own.rebase()
    own.decay(0.5)
    own.add(sample(own, x, g.flip(0) * draw(*g.shape, seed=5)))
    old = own.block()
    own.rebase()
    new = own.block()
    assert isinstance(new, EigenKronecker)
    q, factors = vectors(new), own.base.block().tensors()
    assert off_diagonal(new.output.mT @ factors["output"] @ new.output) < 1e-10
    assert relative(new.values.flatten(-2), (q.mT @ old.matrices() @ q).diagonal(dim1=-2, dim2=-1)) < 1e-10
    assert relative(new.to_dense(), old.to_dense()) > 1e-3
    torch.testing.assert_close(new.trace(), old.trace(), rtol=1e-12, atol=0)
    own.rebase()
    same(own.block(), new)


def test_an_estimator_counts_up_both() -> None:
    model = small()
    estimator = Estimator(model, kf.Categorical(), approximation="ekfac", source="exact")
    for x, y in pairs():
        with record(estimator.adaptation.adapters) as tape:
            out = model(x)
        estimator.update(tape, out, y)
    plain = kf.estimate(model, kf.Categorical(), pairs(), source="exact")
    assert relative(estimator.curvature().to_dense(), plain.to_dense()) < 1e-10


# ---------------------------------------------------------------------------------------------------- other bases
class FixedStatistic(KFACStatistic):
    """Factors that have nothing to do with the data, at a scale of their own."""

    def block(self) -> Block:
        a, g = (
            random_psd(*self.layer.stack, width, width, seed=width) for width in (self.layer.d_in, self.layer.d_out)
        )
        return Kronecker(a, 100 * g)


class Fixed(KFAC):
    name = "fixed"

    def start(self, layer: LayerAdapter) -> FixedStatistic:
        return FixedStatistic(layer)


@pytest.mark.parametrize("name", ["linear", "conv2d, groups, dilated", "linear, positions"])
def test_of_any_base_only_the_eigenvectors_matter(name: str) -> None:
    model, x, y = behind(name)
    exact = kf.reference.ggn(model, kf.Categorical(), x, y)
    found = kf.estimate(model, kf.Categorical(), (x, y), source="exact", approximation=EKFAC(Fixed()))
    for layer, block in found.blocks.items():
        adapter = found.layouts[layer]
        assert isinstance(block, EigenKronecker)
        assert isinstance(adapter, LayerAdapter)
        q, factors = vectors(block), Fixed().start(adapter).block().tensors()
        assert off_diagonal(block.output.mT @ factors["output"] @ block.output) < 1e-10
        diagonal = (q.mT @ exact_parts(model, adapter, exact) @ q).diagonal(dim1=-2, dim2=-1)
        assert relative(block.values.flatten(-2), diagonal) < 1e-10


# ---------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("name", ["linear", "conv2d, groups, dilated", "linear, positions"])
def test_values_do_not_depend_on_the_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = behind(name)
    found = []
    for chunk in (1 << 24, 1, 400):
        monkeypatch.setattr("kronfac.approximations.ekfac.CHUNK", chunk)
        found.append(kf.estimate(model, kf.Categorical(), (x, y), source="exact", approximation="ekfac").to_dense())
    assert relative(found[1], found[0]) < 1e-12
    assert relative(found[2], found[0]) < 1e-12


def test_few_rows_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    own = statistic(nn.Conv1d(2, 3, 2).double())
    own.add(sample(own, draw(11, 2, 5), draw(11, 3, 4)))
    own.rebase()
    monkeypatch.setattr("kronfac.approximations.ekfac.CHUNK", 3 * 2 * (4 * 8 + 15))
    seen: list[int] = []
    original = own.layer.expand
    monkeypatch.setattr(own.layer, "expand", lambda x: (seen.append(len(x)), original(x))[1])
    own._final = True  # the factors are complete, and look at no rows any more
    own.add(sample(own, draw(11, 2, 5), draw(11, 3, 4)))
    assert seen == [3, 3, 3, 2]


def test_a_large_vocabulary_never_becomes_a_matrix_nor_a_gradient() -> None:
    """The square of 50 000 would take 20 GB; gradients of the 64 examples 100 MB, of which 320 columns are not zero."""
    layer = nn.Embedding(50_000, 4, padding_idx=7).double()
    own = statistic(layer)
    x = torch.randint(50_000, (64, 5), generator=seeded())
    x[0] = torch.tensor([3, 3, 7, 3, 9])
    g = draw(64, 5, 4)
    own.add(sample(own, x, g))
    own.rebase()
    own.moments.total.zero_()
    own.moments.weight = 0.0
    own.add(sample(own, x, g))
    block = own.block()
    assert isinstance(block, EigenKronecker)
    assert block.input is None
    assert block.values.shape == (4, 50_000)
    torch.testing.assert_close(block.values[:, 3], ((g[0, [0, 1, 3]].sum(0) @ block.output).square()) / 64)
    assert block.values[:, 7].norm() == 0
    assert (block.values.norm(dim=0) > 0).sum() == x[x != 7].unique().numel()


# ---------------------------------------------------------------------------------------------------- refused
def test_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"approximation='ekfac' needs paired statistics.*source='forward_only'"):
        Estimator(small(), kf.Categorical(), approximation="ekfac", source="forward_only")
    with pytest.raises(TypeError, match=r"base must be a kronfac.approximations.Approximation, not str"):
        EKFAC("kfac")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"needs the eigenvectors of an input and an output factor.*layer '0'"):
        kf.estimate(small(), kf.Categorical(), pairs(), approximation=EKFAC(DiagonalBlocks()))


def test_layers_whose_examples_are_merged_are_refused() -> None:
    model = double(nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 3), nn.Unflatten(0, (4, 2))))
    with pytest.raises(ValueError, match=r"approximation='ekfac' needs the examples one by one.*layer '1'"):
        kf.estimate(model, kf.Gaussian(), (draw(4, 2, 3), None), approximation="ekfac")


def test_a_layer_that_is_never_called_is_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(RuntimeError, match=r"No statistics for layers \['idle'\]"):
        kf.estimate(double(Idle()), kf.Categorical(), pairs(), approximation="ekfac")


def test_overflow_of_the_moments_is_named() -> None:
    own = statistic(nn.Linear(3, 2))
    own.add(sample(own, torch.ones(4, 3), torch.ones(4, 2)))
    own.rebase()
    own.next_pass()
    own.add(sample(own, torch.full((4, 3), 1e19), torch.full((4, 2), 1e19)))
    with pytest.raises(FloatingPointError, match="second moments of layer 'layer' overflowed"):
        own.block()
