"""TKFAC's block against its formula, its trace against the oracle's, and the cases in which it is exact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.exactness_helpers import block_errors, double, draw, ggn_errors
from tests.layers.layer_cases import CASES, NORMS
from torch import Tensor, nn
from torch.nn import functional as F

import kronfac as kf
from kronfac.approximations import TKFAC
from kronfac.approximations.tkfac import TKFACStatistic
from kronfac.blocks import Dense, ScaledKronecker
from kronfac.curvature import BlockDiagonal
from kronfac.estimator import Estimator
from kronfac.layers import LayerAdapter, adapt
from kronfac.sources import Sample, Sampled
from kronfac.tape import record

LABELS = torch.tensor([0, 2, 1, 1, 0])
WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
LOSSES: dict[str, tuple[kf.Likelihood, Tensor]] = {
    "categorical": (kf.Categorical(), LABELS),
    "class weights": (kf.Categorical(weight=WEIGHTS), LABELS),
    "ignored": (kf.Categorical(ignore_index=1), LABELS),
    "sum": (kf.Categorical(reduction="sum"), LABELS),
    "bernoulli": (kf.Bernoulli(), F.one_hot(LABELS, 3).double()),
    "gaussian, batchmean": (kf.Gaussian(reduction="batchmean"), draw(5, 3)),
}


def perceptron() -> nn.Module:
    return double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)))


def convolutional() -> nn.Module:
    return double(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(4, 6, (2, 3), stride=2, groups=2),
            nn.GroupNorm(2, 6),
            nn.Flatten(),
            nn.Linear(36, 3),
        )
    )


def samples(adapter: LayerAdapter, x: Tensor, cotangents: list[Tensor], denominator: float) -> Iterator[Sample]:
    for index, g in enumerate(cotangents):
        yield Sample(adapter, x, g, 1 / len(cotangents), denominator, len(x), index == 0)


def naive(pairs: list[tuple[Tensor, Tensor, float]], denominator: float) -> Tensor:
    """``δ Φ ⊗ Ψ`` of rows ``[R, d_in]`` and ``[R, d_out]`` by loops (4.9), (4.13 corrected)."""
    (d_in, d_out), dtype = (pairs[0][0].shape[1], pairs[0][1].shape[1]), torch.float64
    delta, phi, psi = 0.0, torch.zeros(d_in, d_in, dtype=dtype), torch.zeros(d_out, d_out, dtype=dtype)
    for rows, cotangents, weight in pairs:
        for a, u in zip(rows, cotangents, strict=True):
            delta += weight * float(a @ a) * float(u @ u)
            phi += weight * float(u @ u) * torch.outer(a, a)
            psi += weight * float(a @ a) * torch.outer(u, u)
    return delta / denominator * torch.kron(psi / delta, phi / delta)


# ---------------------------------------------------------------------------------------------------- the formula
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", [name for name in CASES if name not in NORMS])
def test_the_block_is_the_formula(name: str, sharing: str) -> None:
    """Two batches with a decay between them, two pulls each, and a denominator that is no count."""
    if sharing == "reduce" and "embedding" in name:
        sharing = "expand"
    module = CASES[name].module()
    adapter = adapt(module, "layer", sharing)
    statistic = TKFAC().start(adapter)
    pairs: list[tuple[Tensor, Tensor, float]] = []
    for step, factor in ((0, 0.3), (1, 1.0)):
        x = CASES[name].input(seed=step)
        cotangents = [draw(*module(x).shape, seed=10 * step + pull) for pull in (0, 1)]
        statistic.decay(0.3)
        for sample in samples(adapter, x, cotangents, 7.0):
            statistic.add(sample)
        rows = adapter.rows(x).double()
        pairs += [(rows, adapter.output_rows(g), 0.5 * factor) for g in cotangents]
    block = statistic.block()
    assert isinstance(block, ScaledKronecker)
    parts = []
    for index in range(adapter.stack[0] if adapter.stack else 1):
        own = [(a[:, :, index], u[:, :, index], w) if adapter.stack else (a, u, w) for a, u, w in pairs]
        parts.append(naive([(a.flatten(0, 1), u.flatten(0, 1), w) for a, u, w in own], 1.3 * 7.0))
    wanted = torch.block_diag(*parts)
    torch.testing.assert_close(block.to_dense(), wanted, rtol=1e-10, atol=1e-12 * float(wanted.abs().max()))
    traces = [
        t.diagonal(dim1=-2, dim2=-1).sum(-1) for t in (block.output, block.input) if t.ndim > len(adapter.stack) + 1
    ]
    for trace in traces:
        torch.testing.assert_close(trace, torch.ones_like(trace))


# ---------------------------------------------------------------------------------------------------- the trace
def traces(curvature: BlockDiagonal) -> Tensor:
    return torch.stack([block.trace() for block in curvature.blocks.values()])


@pytest.mark.parametrize("loss", LOSSES)
def test_the_trace_of_linear_layers_is_the_oracles(loss: str) -> None:
    model, x, (likelihood, y) = perceptron(), draw(5, 3), LOSSES[loss]
    curvature = kf.estimate(model, likelihood, (x, y), approximation="tkfac", source="exact")
    found = torch.cat([value.flatten() for value in curvature.diagonal().values()]).sum()
    wanted = kf.reference.ggn(model, likelihood, x, y).trace()
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    torch.testing.assert_close(traces(curvature).sum(), wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("source", ["sampled", "empirical", "exact"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_trace_is_that_of_the_dense_blocks_for_the_same_cotangents(loss: str, source: str) -> None:
    """Whatever is sampled, and under a decay: to rounding, layer by layer."""
    likelihood, y = LOSSES[loss]
    found = []
    for approximation in ("tkfac", "dense"):
        model = perceptron()
        estimator = Estimator(
            model,
            likelihood,
            approximation=approximation,
            source=source,
            samples=3 if source == "sampled" else 1,
            generator=torch.Generator().manual_seed(4),
        )
        for step, decay in enumerate((1.0, 0.9, 0.5)):
            estimator.decay(decay)
            with record(estimator.adaptation.adapters) as tape:
                estimator.update(tape, model(draw(5, 3, seed=step)), y)
            found.append(traces(estimator.curvature()))
    for tkfac, dense in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(tkfac, dense, rtol=1e-9, atol=0)


def test_the_trace_of_a_convolution_takes_positions_as_uncorrelated() -> None:
    """``Σᵢ E[|aᵢ|²|uᵢ|²]`` by unfolding and plain autograd, for every class and its weight in the softmax's Hessian."""
    model = double(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)))
    x = draw(5, 2, 4, 4)
    curvature = kf.estimate(model, kf.Categorical(), (x, LABELS), approximation="tkfac", source="exact")
    rows = F.unfold(x, 3, padding=1, stride=2).square().sum(1) + 1
    hidden = model[0](x).detach().requires_grad_()
    logits = model[1:](hidden)
    derivatives = torch.stack([torch.autograd.grad(logits[:, k].sum(), hidden, retain_graph=True)[0] for k in range(3)])
    p = logits.softmax(1)
    hessian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    norms = torch.einsum("nkl,kncyx,lncyx->nyx", hessian, derivatives, derivatives).flatten(1)
    torch.testing.assert_close(curvature.blocks["0"].trace(), (rows * norms).sum() / 5, rtol=1e-9, atol=0)


# ---------------------------------------------------------------------------------------------------- exact cases
def test_one_datum_is_exact_for_linear_layers() -> None:
    errors = ggn_errors(perceptron(), kf.Categorical(), draw(1, 3), LABELS[:1], approximation="tkfac")
    assert max(errors.values()) < 1e-12


def test_a_deep_linear_network_with_a_quadratic_loss_is_exact() -> None:
    model = double(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    assert max(ggn_errors(model, kf.Gaussian(), draw(6, 3), draw(6, 2, seed=1), approximation="tkfac").values()) < 1e-12
    words = double(nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(3, 2)))
    x = torch.tensor([[0], [3], [3], [1]])
    assert max(ggn_errors(words, kf.Gaussian(), x, draw(4, 2), approximation="tkfac").values()) < 1e-12


def test_a_single_output_is_exact_where_kfac_is_not() -> None:
    model, x, y = double(nn.Sequential(nn.Linear(3, 1))), 3 * draw(6, 3), torch.ones(6, 1, dtype=torch.float64)
    assert ggn_errors(model, kf.Bernoulli(), x, y, approximation="tkfac")["0"] < 1e-12
    assert ggn_errors(model, kf.Bernoulli(), x, y, approximation="kfac")["0"] > 0.05


def test_a_trained_like_network_is_closer_than_kfac_in_sum() -> None:
    model, x, y = perceptron(), 2 * draw(40, 3), torch.arange(40) % 3
    errors = [sum(ggn_errors(model, kf.Categorical(), x, y, approximation=name).values()) for name in ("tkfac", "kfac")]
    assert errors[0] < errors[1]


# ---------------------------------------------------------------------------------------------------- the face
def test_convolutions_groups_and_norms_have_their_blocks_and_survive_saving(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = convolutional()
    curvature = kf.estimate(model, kf.Categorical(), (draw(5, 2, 6, 6), LABELS), approximation="tkfac", seed=0)
    kinds = [type(block) for block in curvature.blocks.values()]
    assert kinds == [ScaledKronecker, ScaledKronecker, Dense, ScaledKronecker]
    assert curvature.blocks["2"].tensors()["delta"].shape == (2,)
    kf.save(curvature, tmp_path / "curvature.safetensors")
    again = kf.load(tmp_path / "curvature.safetensors", model)
    assert torch.equal(again.to_dense(), curvature.to_dense())


@pytest.mark.parametrize("rule", ["factored", "exact", "normal", "trace_restricted"])
def test_every_damping_rule_solves(rule: str) -> None:
    model = convolutional()
    curvature = kf.estimate(model, kf.Categorical(), (draw(5, 2, 6, 6), LABELS), approximation="tkfac", seed=0)
    inverse = curvature.factorise(0.1, rule)
    vector = {name: draw(*p.shape, seed=i) for i, (name, p) in enumerate(model.named_parameters())}
    solved = inverse.apply(vector)
    assert float(sum((solved[name] * vector[name]).sum() for name in vector)) > 0
    if rule == "exact":
        back = curvature.matmul(solved)
        for name, value in vector.items():
            torch.testing.assert_close(back[name] + 0.1 * solved[name], value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("source", ["sampled", "exact"])
@pytest.mark.parametrize("make", [perceptron, convolutional])
def test_verify_finds_the_trace_as_defined(make: Any, source: str) -> None:
    model = make()
    x = draw(4, 3) if make is perceptron else draw(4, 2, 6, 6)
    report = kf.verify(model, kf.Categorical(), (x, LABELS[:4]), approximation="tkfac", source=source)
    report.raise_if(scale=1e-9)
    assert all(row.trace_factor is not None and row.input_factor is None for row in report.rows)


def test_verify_sees_a_wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TKFACStatistic.block
    monkeypatch.setattr(TKFACStatistic, "block", lambda self: right(self).scale(1.1))
    report = kf.verify(convolutional(), kf.Categorical(), (draw(4, 2, 6, 6), LABELS[:4]), approximation="tkfac")
    with pytest.raises(RuntimeError, match=r"tr C.*1\.1"):
        report.raise_if(scale=0.01)


def test_coverage_describes_the_blocks() -> None:
    rows = {row.parameter: row for row in kf.coverage(convolutional(), approximation="tkfac").rows}
    assert (rows["2.weight"].block, rows["2.weight"].factors) == ("scaled kronecker", "2 of 13x13 (x) 3x3")
    assert "one product that keeps both partial traces" in rows["2.weight"].reason
    assert "positions as uncorrelated" in rows["2.weight"].reason
    assert rows["0.weight"].factor_bytes == (19 * 19 + 4 * 4) * 8
    single = kf.coverage(nn.Sequential(nn.Linear(3, 1)), approximation="tkfac", sharing="reduce").rows[0]
    assert "partial traces" not in single.reason


# ---------------------------------------------------------------------------------------------------- refused
class Recursive(Sampled):
    """A source that averages before it hands out."""

    name, paired = "recursive", False


@pytest.mark.parametrize("source", ["forward_only", Recursive()])
def test_a_source_without_pairs_is_refused(source: Any) -> None:
    name = source if isinstance(source, str) else source.name
    with pytest.raises(ValueError, match=f"'tkfac' needs paired statistics.*source='{name}' does not offer"):
        Estimator(perceptron(), kf.Categorical(), approximation="tkfac", source=source)


def test_samples_that_do_not_pair_are_refused() -> None:
    module = nn.ConvTranspose1d(2, 3, 3, stride=2).double()
    adapter = adapt(module, "up")
    statistic, x = TKFAC().start(adapter), draw(2, 2, 4)
    with pytest.raises(ValueError, match="needs cotangents"):
        statistic.add(Sample(adapter, x, None, 1.0, 2.0, 2, True))
    longer = module(x, output_size=[10])
    with pytest.raises(ValueError, match=r"Layer 'up': its input has rows \(2, 9\), its cotangent \(2, 10\)"):
        statistic.add(Sample(adapter, x, draw(*longer.shape), 1.0, 2.0, 2, True))
    assert statistic.empty


def test_a_layer_without_signal_has_a_zero_block() -> None:
    adapter = adapt(nn.Linear(3, 2).double(), "layer")
    statistic = TKFAC().start(adapter)
    statistic.add(Sample(adapter, draw(4, 3), torch.zeros(4, 2, dtype=torch.float64), 1.0, 4.0, 4, True))
    block = statistic.block()
    assert float(block.trace()) == 0
    assert block.factorise(kf.damping.get_rule("trace_restricted")(block, 0.0)).apply(draw(2, 4)).isfinite().all()


def test_blocks_fit_the_oracle_in_shape() -> None:
    """The helper that all of the above rests on sees an error where there is one."""
    model, x = perceptron(), draw(5, 3)
    curvature = kf.estimate(model, kf.Categorical(), (x, LABELS), approximation="tkfac", source="exact").scale(2.0)
    assert min(block_errors(curvature, model, kf.reference.ggn(model, kf.Categorical(), x, LABELS)).values()) > 0.5
