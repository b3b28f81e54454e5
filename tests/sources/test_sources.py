"""Sources against the curvature they stand for, and against each other."""

from __future__ import annotations

import pytest
import torch
from tests.exactness_helpers import block_errors, double, draw, relative, seeded
from torch import Tensor, nn

import kronfac as kf
from kronfac.layers import adapt_model
from kronfac.sources import SOURCES, Empirical, Exact, ForwardOnly, Sampled, Source, align_weights, get_source
from kronfac.tape import record

CATEGORICAL = kf.Categorical()


def small() -> nn.Module:
    return double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))


def pulls(source: Source, model: nn.Module, likelihood: kf.Likelihood, x: Tensor, y: object = None, seed: int = 0):
    with record(adapt_model(model).adapters) as tape:
        out = model(x)
    return list(source.samples(tape, likelihood, out, y, seeded(seed)))


# ---------------------------------------------------------------------------------------------------- messages
def test_samples_are_pairs_with_weights_that_sum_to_one() -> None:
    model, x = small(), draw(5, 3)
    found = pulls(Sampled(4), model, kf.Categorical(), x)
    assert len(found) == 4
    for index, samples in enumerate(found):
        assert [sample.layer.name for sample in samples] == ["0", "2"]
        for sample in samples:
            assert sample.weight == 0.25
            assert sample.first == (index == 0)
            assert sample.denominator == 5.0
            assert sample.row_weights is None
            assert sample.cotangents is not None
            assert sample.cotangents.shape[0] == sample.inputs.shape[0] == 5
    assert torch.equal(found[0][0].inputs, x)


def test_exact_columns_are_as_many_as_outputs_and_of_weight_one() -> None:
    found = pulls(Exact(), small(), kf.Categorical(), draw(5, 3))
    assert len(found) == 3
    assert {sample.weight for samples in found for sample in samples} == {1.0}


def test_the_last_layers_cotangents_are_the_likelihoods() -> None:
    model, x, y = small(), draw(5, 3), torch.arange(5) % 3
    likelihood = kf.Categorical(label_smoothing=0.1)
    z = model(x).detach()
    (samples,) = pulls(Empirical(), model, likelihood, x, y)
    torch.testing.assert_close(samples[-1].cotangents, likelihood.target_cotangents(z, y))
    (samples,) = pulls(Sampled(), model, likelihood, x)
    torch.testing.assert_close(samples[-1].cotangents, likelihood.sample_cotangents(z, None, seeded()))
    (samples,) = pulls(Sampled(probe="root"), model, likelihood, x)
    torch.testing.assert_close(samples[-1].cotangents, likelihood.probe_cotangents(z, None, seeded()))
    (samples,) = pulls(ForwardOnly(), model, likelihood, x)
    assert all(sample.cotangents is None for sample in samples)


def test_labels_come_from_the_generator_alone() -> None:
    model, x = small(), draw(5, 3)

    def dense(seed: int, noise: int) -> Tensor:
        torch.manual_seed(noise)
        return kf.estimate(model, kf.Categorical(), (x, None), seed=seed).to_dense()

    assert torch.equal(dense(3, noise=0), dense(3, noise=1))
    assert not torch.equal(dense(3, noise=0), dense(4, noise=0))
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    dense(0, noise=5)
    torch.manual_seed(5)
    kf.estimate(model, kf.Categorical(), (x, None))
    assert torch.equal(torch.rand(3), wanted), "the global generator was used"


# ---------------------------------------------------------------------------------------------------- expectation
def deviation(curvature: kf.BlockDiagonal, exact: kf.BlockDiagonal) -> float:
    return relative(curvature.to_dense(), exact.to_dense())


@pytest.mark.parametrize("probe", ["labels", "root"])
@pytest.mark.parametrize("likelihood", [kf.Categorical(), kf.Gaussian(0.4), kf.Bernoulli()])
def test_sampled_tends_to_exact(likelihood: kf.Likelihood, probe: str) -> None:
    model, x = small(), draw(4, 3)
    exact = kf.estimate(model, likelihood, (x, None), source="exact", approximation="dense")
    source = Sampled(2000, probe)
    assert deviation(kf.estimate(model, likelihood, (x, None), source=source, approximation="dense"), exact) < 0.06


def mean_error(
    exact: kf.BlockDiagonal,
    model: nn.Module,
    x: Tensor,
    source: Sampled,
    seeds: int,
    likelihood: kf.Likelihood = CATEGORICAL,
) -> float:
    """Root mean square over seeds of the relative error of the sampled Fisher."""
    errors = [
        deviation(kf.estimate(model, likelihood, (x, None), source=source, seed=seed), exact) for seed in range(seeds)
    ]
    return float(torch.tensor(errors).square().mean().sqrt())


def test_the_error_falls_as_one_over_the_root_of_the_samples() -> None:
    """Over three decades: 1 to 1000 samples."""
    model, x = small(), draw(6, 3)
    exact = kf.estimate(model, kf.Categorical(), (x, None), source="exact")
    counts = torch.tensor([1.0, 10, 100, 1000], dtype=torch.float64)
    seeds = (40, 20, 10, 6)
    errors = torch.tensor(
        [mean_error(exact, model, x, Sampled(int(k)), n) for k, n in zip(counts, seeds, strict=True)],
        dtype=torch.float64,
    )
    design = torch.stack((counts.log10(), torch.ones(4, dtype=torch.float64)), 1)
    slope = float(torch.linalg.lstsq(design, errors.log10().unsqueeze(1)).solution[0])
    assert slope == pytest.approx(-0.5, abs=0.05), errors
    assert float(errors[0] / errors[-1]) == pytest.approx(1000**0.5, rel=0.3)


@pytest.mark.parametrize(("likelihood", "ratio"), [(kf.Categorical(), 0.7), (kf.Bernoulli(), 0.9)])
def test_root_probes_have_lower_variance(likelihood: kf.Likelihood, ratio: float) -> None:
    """Much lower where predictions are confident: a rare label is never drawn, or counts for many."""
    model, x = double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), scale=3.0), draw(6, 3)
    exact = kf.estimate(model, likelihood, (x, None), source="exact")
    labels, root = (mean_error(exact, model, x, Sampled(20, probe), 30, likelihood) for probe in ("labels", "root"))
    assert root < ratio * labels


def test_root_probes_of_single_outputs_have_no_variance() -> None:
    """Random signs square to one."""
    model, x = double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))), draw(6, 3)
    for likelihood in (kf.Gaussian(0.3), kf.Bernoulli()):
        exact = kf.estimate(model, likelihood, (x, None), source="exact")
        assert mean_error(exact, model, x, Sampled(1, "root"), 1, likelihood) < 1e-12
        assert mean_error(exact, model, x, Sampled(1), 1, likelihood) > 0.01


def last_cotangents(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of the labels, and the first layer's cotangent under each: ``[N, K]`` and ``[N, K, d]``."""
    with record(adapt_model(model).adapters) as tape:
        out = model(x)
    probabilities = out.detach().softmax(1)
    scores = [probabilities - nn.functional.one_hot(torch.tensor(k), 3) for k in range(3)]
    return probabilities, torch.stack([tape.pull(out, score)["0"] for score in scores], 1)


@pytest.mark.parametrize("samples", [1, 5])
def test_monte_carlo_error_is_the_expected_one(samples: int) -> None:
    """``E|Ĝ - G|² = Σ_n (Σ_y p |g_ny|⁴ - |G_n|²) / (k N²)``, by enumeration of the labels."""
    model, x, repeats = small(), draw(6, 3), 250
    p, g = last_cotangents(model, x)
    per_example = torch.einsum("nk,nki,nkj->nij", p, g, g)
    fourth = (p * g.square().sum(-1).square()).sum()
    variance = float((fourth - per_example.square().sum()) / (samples * len(x) ** 2))
    exact = per_example.sum(0) / len(x)
    squares = []
    for seed in range(repeats):
        curvature = kf.estimate(model, kf.Categorical(), (x, None), source=Sampled(samples), seed=seed)
        squares.append((curvature.blocks["0"].tensors()["output"] - exact).square().sum())
    found = torch.stack(squares)
    spread = float(found.std() / repeats**0.5)
    assert abs(float(found.mean()) - variance) < 4 * spread
    assert spread < 0.1 * variance, "too few repeats to tell"


def coupled() -> nn.Module:
    """Batch norm in train mode: every output depends on every example."""
    return double(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)), scale=1.0)


def test_sampled_labels_keep_examples_apart_under_batch_norm() -> None:
    """The expectation of the output factor, by pulling every example's root columns alone."""
    model, x = coupled(), draw(5, 3)
    assert model.training
    with record(adapt_model(model).adapters) as tape:
        out = model(x)
    wanted = torch.zeros(4, 4, dtype=torch.float64)
    together = torch.zeros_like(wanted)
    for column in kf.Categorical().root_columns(out.detach()):
        g = tape.pull(out, column)["0"]
        together += g.T @ g
        for n in range(len(x)):
            alone = torch.zeros_like(column)
            alone[n] = column[n]
            g = tape.pull(out, alone)["0"]
            wanted += g.T @ g
    wanted, together = wanted / len(x), together / len(x)
    assert relative(together, wanted) > 0.1, "the test could not tell"
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for probe in ("labels", "root"):
        curvature = kf.estimate(model, kf.Categorical(), (x, None), source=Sampled(2000, probe))
        assert relative(curvature.blocks["0"].tensors()["output"], wanted) < 0.05
    assert model.training
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("source", ["exact", "empirical"])
def test_sources_that_would_mix_examples_are_refused(source: str) -> None:
    model, x, y = coupled(), draw(5, 3), torch.arange(5) % 3
    with pytest.raises(ValueError, match=rf'source="{source}" pulls all examples at once.*model.eval\(\)'):
        kf.estimate(model, kf.Categorical(), (x, y), source=source)
    model.eval()
    curvature = kf.estimate(model, kf.Categorical(), (x, y), source=source, approximation="dense")
    oracle = kf.reference.ggn if source == "exact" else kf.reference.empirical_fisher
    assert max(block_errors(curvature, model, oracle(model, kf.Categorical(), x, y)).values()) < 1e-8


def test_forward_only_keeps_the_inputs_and_an_identity() -> None:
    model, x = small(), draw(7, 3)
    curvature = kf.estimate(model, kf.Categorical(), [(x[:3], None), (x[3:], None)], source="forward_only")
    tensors = curvature.blocks["0"].tensors()
    rows = torch.cat((x, torch.ones(7, 1, dtype=torch.float64)), 1)
    torch.testing.assert_close(tensors["input"], rows.T @ rows / 7)
    torch.testing.assert_close(tensors["output"], torch.eye(4, dtype=torch.float64))


def test_forward_only_gives_norms_the_identity() -> None:
    model = double(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)))
    curvature = kf.estimate(model, kf.Categorical(), (draw(7, 3), None), source="forward_only")
    torch.testing.assert_close(curvature.blocks["1"].to_dense(), torch.eye(8, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------- row weights
class Alignment(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


@pytest.mark.parametrize(
    ("layer", "shape", "weights", "sharing", "wanted"),
    [
        (nn.Linear(2, 1), (3, 2), draw(3), "expand", (3, 1)),
        (nn.Linear(2, 1), (3, 4, 2), draw(3, 4), "expand", (3, 4)),
        (nn.Linear(2, 1), (3, 4, 5, 2), draw(3, 4, 5), "expand", (3, 20)),
        (nn.Linear(2, 1), (12, 2), draw(3, 4), "expand", (12, 1)),
        (nn.Linear(2, 1), (3, 4, 2), draw(3), "expand", (3, 4)),
        (nn.Linear(2, 1), (3, 2), draw(3, 4), "expand", (3, 1)),
        (nn.Linear(2, 1), (3, 4, 2), draw(3, 4), "reduce", (3, 1)),
        (nn.Conv1d(2, 1, 2), (3, 2, 5), draw(3), "expand", (3, 4)),
        (nn.Conv2d(2, 1, 1), (3, 2, 4, 5), draw(3, 4, 5), "expand", (3, 20)),
    ],
)
def test_weights_are_brought_to_a_layers_rows(
    layer: nn.Module, shape: tuple[int, ...], weights: Tensor, sharing: str, wanted: tuple[int, int]
) -> None:
    adapter = adapt_model(Alignment(layer), sharing=sharing).adapters["layer"]
    found = align_weights(adapter, torch.zeros(shape), weights)
    assert found is not None
    assert found.shape == wanted
    if found.numel() == weights.numel():
        assert torch.equal(found.flatten(), weights.flatten())
    else:
        torch.testing.assert_close(found, weights.reshape(3, -1).sum(1, keepdim=True).expand(wanted))


@pytest.mark.parametrize(
    ("layer", "shape", "weights", "outputs"),
    [
        (nn.Linear(2, 1), (3, 4, 2), draw(3, 4, 5), -1),
        (nn.Linear(2, 1), (3, 4, 2), draw(3, 4, 4), -1),
        (nn.Conv1d(2, 1, 1), (3, 2, 4), draw(3, 5, 4), 1),
        (nn.Conv1d(2, 1, 1), (3, 2, 4), draw(3, 4, 4), 1),
        (nn.Conv2d(2, 1, 1), (3, 2, 4, 2), draw(3, 5, 4, 2), 1),
        (nn.LayerNorm(2), (3, 4, 2), draw(3, 4, 5), -1),
        (nn.BatchNorm1d(2), (3, 2, 4), draw(3, 5, 4), 1),
    ],
)
def test_the_terms_of_a_position_are_added_up(
    layer: nn.Module, shape: tuple[int, ...], weights: Tensor, outputs: int
) -> None:
    for norm in ("unitwise", "full"):
        adapter = adapt_model(Alignment(layer), norm=norm).adapters["layer"]
        found = align_weights(adapter, torch.zeros(shape), weights)
        torch.testing.assert_close(found, weights.sum(outputs).flatten(1))


def test_no_weights_stay_none_and_a_foreign_batch_is_refused() -> None:
    adapter = adapt_model(Alignment(nn.Linear(2, 1))).adapters["layer"]
    assert align_weights(adapter, torch.zeros(3, 2), None) is None
    with pytest.raises(ValueError, match=r"'layer'.*\(4, 3\).*\(3,\).*Keep the batch first"):
        align_weights(adapter, torch.zeros(4, 3, 2), torch.ones(3))


def test_weights_of_one_are_none_so_that_fast_paths_stay_open() -> None:
    y = torch.ones(5, dtype=torch.long)
    (samples,) = pulls(Sampled(), small(), kf.Categorical(torch.tensor([2.0, 1.0, 1.0])), draw(5, 3), y)
    assert samples[0].row_weights is None
    y[1:] = 0
    (samples,) = pulls(Sampled(), small(), kf.Categorical(torch.tensor([2.0, 1.0, 1.0])), draw(5, 3), y)
    assert samples[0].row_weights is not None
    assert samples[0].row_weights.flatten().tolist() == [1.0, 2.0, 2.0, 2.0, 2.0]


class Positioned(nn.Module):
    """Embeddings of positions are looked up once for all examples, unless expanded, and scale or shift them."""

    def __init__(self, expanded: bool, scale: bool = True) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(5, 3), nn.Embedding(4, 3), nn.Linear(3, 2)
        self.expanded, self.scale = expanded, scale
        double(self)

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(x.shape[1])
        tokens, positions = self.tokens(x), self.positions(index.expand_as(x) if self.expanded else index)
        return self.head(tokens * positions if self.scale else tokens + positions).mean(1)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"source": "exact"}, "source=.exact."),
        ({"source": "empirical"}, "source=.empirical."),
        ({"approximation": "dense"}, "dense block"),
        ({"approximation": "diagonal"}, "diagonal"),
    ],
)
def test_layers_that_sum_over_examples_are_refused_where_that_matters(options: dict[str, str], what: str) -> None:
    x, y = torch.randint(5, (6, 4), generator=seeded()), draw(6, 2)
    with pytest.raises(ValueError, match=rf"{what}.*'positions'.* is 4, not the batch of 6"):
        kf.estimate(Positioned(False), kf.Gaussian(), (x, y), **options)
    kf.estimate(Positioned(False), kf.Gaussian(), (x, y))
    kf.estimate(Positioned(True), kf.Gaussian(), (x, y), **options)
    shared, apart = Positioned(False, scale=False), Positioned(True, scale=False)
    apart.load_state_dict(shared.state_dict())
    found, wanted = (kf.estimate(model, kf.Gaussian(), (x, y), **options).to_dense() for model in (shared, apart))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


# ---------------------------------------------------------------------------------------------------- arguments
def test_sources_by_name_and_as_objects() -> None:
    assert {name: type(get_source(name)) for name in SOURCES} == SOURCES
    own = Sampled(3, "root")
    assert get_source(own) is own
    assert get_source("sampled", 7).count == 7


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: get_source("guessed"), ValueError, "source='guessed' is unknown"),
        (lambda: get_source(3), TypeError, "not int"),
        (lambda: get_source("exact", 2), ValueError, "samples=2 applies"),
        (lambda: Sampled(0), ValueError, "samples=0"),
        (lambda: Sampled(1.5), ValueError, "samples=1.5"),
        (lambda: Sampled(1, "sign"), ValueError, "probe='sign'"),
    ],
)
def test_bad_arguments_are_named(call, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_targets_that_are_needed_and_missing() -> None:
    with pytest.raises(ValueError, match="needs the training targets"):
        kf.estimate(small(), kf.Categorical(), (draw(4, 3), None), source="empirical")
    with pytest.raises(ValueError, match="depends on the targets"):
        kf.estimate(small(), kf.Categorical(ignore_index=0), (draw(4, 3), None))
