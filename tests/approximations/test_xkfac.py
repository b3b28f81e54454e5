"""XK-FAC against brute force through batch norm in train mode; Lee et al. 2020, equations (59) to (79)."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tests.approximations.xkfac_cases import (
    OneByOne,
    Signed,
    activations,
    all_signs,
    cross_gradients,
    equation_59,
    hadamard,
    inputs,
    over_permutations,
    perceptron,
    primes,
)
from tests.exactness_helpers import block_errors, double, draw, relative
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kronfac as kf
from kronfac.approximations.xkfac import XKFACStatistic
from kronfac.blocks import Dense, Kronecker, KroneckerSum
from kronfac.coupling import Coupling
from kronfac.estimator import Estimator
from kronfac.sources import Source
from kronfac.tape import record

LINEAR = {0: Coupling.DIRECT, 3: Coupling.GENERAL, 5: Coupling.DIRECT, 8: Coupling.NONE}


def gathered(
    model: nn.Module,
    *batches: Tensor,
    source: Source | str = "sampled",
    samples: int = 1,
    seed: int = 0,
    **options: str,
) -> Estimator:
    estimator = Estimator(
        model,
        kf.Categorical(),
        approximation="xkfac",
        source=source,
        samples=samples,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )
    for x in batches:
        with record(estimator.adaptation.adapters) as tape:
            out = model(x)
        estimator.update(tape, out)
    return estimator


def statistic(estimator: Estimator, name: str) -> XKFACStatistic:
    found = estimator.statistics[name]
    assert isinstance(found, XKFACStatistic)
    return found


# ------------------------------------------------------------------------------------------------ the estimator
@pytest.mark.parametrize("source", [OneByOne(), Signed(hadamard(8))], ids=["one by one", "Hadamard signs"])
@pytest.mark.parametrize("layer", LINEAR)
def test_moments_of_cotangents_are_those_of_all_pairs_of_examples(layer: int, source: Source) -> None:
    model, x = perceptron(), inputs(8)
    first, second = primes(cross_gradients(model, kf.Categorical(), layer, x))
    found = statistic(gathered(model, x, source=source), str(layer))
    assert found.coupling is LINEAR[layer]
    output = found.output.value()
    output = output.triu() + output.triu(1).T
    if layer == 3:
        total = found.output_sum.value()
        assert relative(total.triu() + total.triu(1).T, second) < 1e-12
        assert relative(output, first - second / 8) < 1e-12
    elif layer == 8:
        assert relative(output, first) < 1e-12
        assert relative(second, first) < 1e-12  # K-FAC's case: nothing is coupled
    else:
        assert float(second.norm()) < 1e-12 * float(first.norm())
        assert relative(output, first) < 1e-12


def test_every_pattern_of_signs_is_exact_too_and_no_signs_are_wrong() -> None:
    model, x = perceptron(), inputs(4)
    _, second = primes(cross_gradients(model, kf.Categorical(), 3, x))

    def totals(patterns: Tensor) -> Tensor:
        found = statistic(gathered(model, x, source=Signed(patterns)), "3").output_sum.value()
        return found.triu() + found.triu(1).T

    assert relative(totals(all_signs(4)), second) < 1e-12
    assert relative(totals(torch.ones(1, 4, dtype=torch.float64)), second) > 0.3


def test_sampled_labels_are_unbiased_and_their_error_falls_with_the_root_of_their_number() -> None:
    model, x = perceptron(), inputs(8)
    rows, _ = activations(model, 3, x)
    wanted = equation_59(rows, cross_gradients(model, kf.Categorical(), 3, x))

    def deviation(samples: int) -> tuple[float, float]:
        blocks = [
            gathered(model, x, samples=samples, seed=seed).statistics["3"].block().to_dense() for seed in range(80)
        ]
        errors = [relative(block, wanted) ** 2 for block in blocks]
        return (sum(errors) / len(errors)) ** 0.5, relative(torch.stack(blocks).mean(0), wanted)

    (few, _), (many, bias) = deviation(2), deviation(32)
    assert 3.4 < few / many < 4.7  # sqrt(32 / 2) = 4
    assert bias < 2 * many / 80**0.5


def test_the_error_falls_with_the_root_of_the_number_of_samples_over_three_decades() -> None:
    model, x = perceptron(), inputs(8)
    rows, _ = activations(model, 3, x)
    wanted = equation_59(rows, cross_gradients(model, kf.Categorical(), 3, x))
    found = []
    for samples, draws in ((1, 100), (10, 30), (100, 10), (1000, 4)):
        blocks = [gathered(model, x, samples=samples, seed=s).statistics["3"].block().to_dense() for s in range(draws)]
        mean_square = sum(relative(block, wanted) ** 2 for block in blocks) / draws
        found.append((samples * mean_square) ** 0.5)
    assert max(found) < 2.0 * min(found), found  # error times the root; a bias would grow by a factor of 31.6


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_the_block_is_equation_59(layer: int) -> None:
    model, x = perceptron(), inputs(8)
    rows, _ = activations(model, layer, x)
    wanted = equation_59(rows, cross_gradients(model, kf.Categorical(), layer, x))
    block = gathered(model, x, source=OneByOne()).statistics[str(layer)].block()
    assert isinstance(block, KroneckerSum if layer == 3 else Kronecker)
    assert relative(block.to_dense(), wanted) < 1e-12


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("layer", [0, 3, 5])
def test_the_block_is_the_exact_one_averaged_over_pairings(layer: int, count: int) -> None:
    """A large eps: two examples are otherwise normalised to signs, without derivatives. (60) is the case N = 2."""
    model, x = perceptron(eps=0.5), inputs(count)
    rows, _ = activations(model, layer, x)
    wanted = over_permutations(rows, cross_gradients(model, kf.Categorical(), layer, x))
    block = gathered(model, x, source=OneByOne()).statistics[str(layer)].block()
    assert relative(block.to_dense(), wanted) < 1e-12


def test_a_layer_that_feeds_batch_norm_has_one_product_and_no_bias() -> None:
    model, x = perceptron(), inputs(8)
    block = gathered(model, x, samples=3).statistics["0"].block()
    assert isinstance(block, Kronecker)
    assert float(block.input[-1].abs().max()) == 0.0
    assert float(block.input[:, -1].abs().max()) == 0.0
    assert relative(block.input[:-1, :-1], torch.cov(x.T)) < 1e-12


def test_where_zero_lies_among_the_inputs_makes_a_difference_to_kfac_alone() -> None:
    """Batch norm removes the inputs' mean, so that the network is the same function of shifted inputs."""
    model, x = perceptron(), inputs(8)
    for approximation in ("xkfac", "kfac"):
        here, there = (
            kf.estimate(model, kf.Categorical(), [(batch, None)], approximation=approximation, source="sampled", seed=3)
            for batch in (x, x + 3.0)
        )
        apart = [relative(there.blocks[name].to_dense(), block.to_dense()) for name, block in here.blocks.items()]
        assert (apart[0] > 1.0) == (approximation == "kfac")
        assert max(apart[1:]) < 1e-11
        assert apart[0] < 1e-11 or approximation == "kfac"


def test_second_terms_take_memory_where_there_are_any_alone() -> None:
    found = {name: statistic(gathered(perceptron(), inputs(8)), str(name)) for name in LINEAR}
    for name, kept in found.items():
        second = [kept.input_mean.total, kept.output_sum.total]
        taken = [total.untyped_storage().nbytes() > 8 for total in second]
        assert taken == [LINEAR[name] is Coupling.GENERAL] * 2
        assert [total.shape for total in second] == [kept.input.total.shape, kept.output.total.shape]


def test_forgetting_for_long_leaves_second_terms_that_there_are_not() -> None:
    model, x = perceptron(), inputs(8)
    estimator, fresh = gathered(model, x), gathered(model, x)
    for _ in range(3):
        estimator.decay(1e-5)  # rescales the sums
    estimator.consolidate()
    for name in LINEAR:
        block, wanted = (found.statistics[str(name)].block() for found in (estimator, fresh))
        assert relative(block.to_dense(), wanted.to_dense()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("samples", [1, 2, 5])
def test_both_terms_are_positive_semi_definite_however_few_the_samples(samples: int, dtype: torch.dtype) -> None:
    model, x = perceptron().to(dtype), 100 + inputs(8).to(dtype)
    for name in ("0", "3", "5"):
        block = gathered(model, x, samples=samples).statistics[name].block()
        for factor in block.tensors().values():
            values = torch.linalg.eigvalsh(factor.double())
            assert float(values[0]) >= -10 * torch.finfo(dtype).eps * float(values[-1])


# ------------------------------------------------------------------------------------------------ batches
def test_several_batches_are_pooled() -> None:
    """Covariances by ``N - 1``, outer products of means by ``N``, moments of cotangents by the denominator."""
    model, batches = perceptron(), (inputs(4, 1), inputs(6, 2), inputs(3, 3))
    block = gathered(model, *batches, source=OneByOne()).statistics["3"].block()
    assert isinstance(block, KroneckerSum)
    rows = [activations(model, 3, x)[0] for x in batches]
    pairs = [primes(cross_gradients(model, kf.Categorical(), 3, x)) for x in batches]
    sizes = [len(x) for x in batches]
    covariance = sum((a - a.mean(0)).T @ (a - a.mean(0)) for a in rows) / (sum(sizes) - 3)
    means = sum(n * torch.outer(a.mean(0), a.mean(0)) for n, a in zip(sizes, rows, strict=True)) / sum(sizes)
    within = sum(n * (p - q / n) for n, (p, q) in zip(sizes, pairs, strict=True)) / sum(sizes)
    totals = sum(n * q for n, (_, q) in zip(sizes, pairs, strict=True)) / sum(sizes)
    found = (block.input, block.output, block.second_input, block.second_output)
    for mine, wanted in zip(found, (covariance, within, means, totals), strict=True):
        assert relative(mine, wanted) < 1e-12


def test_without_coupling_the_pooled_formula_is_kfac_whatever_the_batch_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 4 and 8 with the same rows, so that cotangents have one second moment."""
    model = double(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)))
    batches = (inputs(4), inputs(4).repeat(2, 1))
    wanted = kf.estimate(model, kf.Categorical(), [(x, None) for x in batches], source=OneByOne()).blocks["0"]
    names = dict.fromkeys(("0", "2"), Coupling.GENERAL)
    monkeypatch.setattr("kronfac.approximations.xkfac.couplings", lambda tape, outputs: dict(names))
    block = gathered(model, *batches, source=OneByOne()).statistics["0"].block()
    assert isinstance(block, KroneckerSum)
    assert relative(block.to_dense(), wanted.to_dense()) < 1e-12


def test_forgetting_weighs_batches() -> None:
    model, (first, second) = perceptron(), (inputs(4, 1), inputs(6, 2))
    estimator = gathered(model, first, source=OneByOne())
    estimator.decay(0.25)
    with record(estimator.adaptation.adapters) as tape:
        out = model(second)
    estimator.update(tape, out)
    found = estimator.statistics["3"].block()
    alone = [gathered(model, x, source=OneByOne()).statistics["3"].block().tensors() for x in (first, second)]
    for key, weights in {
        "input": (0.25 * 3, 5),
        "second_input": (1, 6),
        "output": (1, 6),
        "second_output": (1, 6),
    }.items():
        mixed = (weights[0] * alone[0][key] + weights[1] * alone[1][key]) / sum(weights)
        assert relative(found.tensors()[key], mixed) < 1e-12


# ------------------------------------------------------------------------------------------------ the graph
class Branches(nn.Module):
    """A skip around batch norm, a functional batch norm, and an output that is fed past it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(4, 4) for _ in range(4))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h + self.norm(self.second(h))
        third = self.third(h)
        return self.last(nn.functional.batch_norm(third, None, None, training=True) + third)


def test_coupling_is_read_off_the_graph() -> None:
    model = double(Branches())
    estimator = gathered(model, draw(5, 4))
    found = {name: statistic(estimator, name).coupling for name in ("first", "second", "third", "last")}
    general, direct = Coupling.GENERAL, Coupling.DIRECT
    assert found == {"first": general, "second": direct, "third": general, "last": Coupling.NONE}


def test_an_in_place_activation_behind_the_layer_is_no_direct_batch_norm() -> None:
    model = double(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    assert statistic(gathered(model, draw(5, 4)), "0").coupling is Coupling.GENERAL


def test_checkpointed_stages_are_read_without_running_them_again() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage, self.last, self.runs = perceptron()[:7], nn.Linear(6, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            return self.last(checkpoint(self.count, x.requires_grad_(), use_reentrant=False))

        def count(self, x: Tensor) -> Tensor:
            self.runs += 1
            return self.stage(x)

    model = double(Checkpointed())
    estimator = Estimator(model, kf.Categorical(), approximation="xkfac", source=OneByOne())
    with record(estimator.adaptation.adapters) as tape:
        out = model(inputs(4))
    estimator.approximation.begin(model, estimator.source, tape, out, estimator.statistics)
    found = {name: statistic(estimator, name).coupling for name in ("stage.0", "stage.3", "stage.5", "last")}
    assert list(found.values()) == list(LINEAR.values())
    assert model.runs == 1


def test_one_norm_in_eval_mode_couples_nothing_and_the_other_does() -> None:
    model = perceptron()
    model[6].eval()
    estimator = gathered(model, inputs(5))
    found = {layer: statistic(estimator, str(layer)).coupling for layer in LINEAR}
    assert found == {0: Coupling.DIRECT, 3: Coupling.NONE, 5: Coupling.NONE, 8: Coupling.NONE}


@pytest.mark.parametrize("norm", [None, nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4), nn.LayerNorm([4, 3, 3])])
def test_without_batch_norm_it_is_kfac(norm: nn.Module | None) -> None:
    middle = [] if norm is None else [norm]
    model = double(nn.Sequential(nn.Conv2d(2, 4, 3), *middle, nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)))
    data = [(draw(4, 2, 5, 5, seed=seed), None) for seed in range(2)]
    mine, kfac = (kf.estimate(model, kf.Categorical(), data, approximation=name) for name in ("xkfac", "kfac"))
    assert torch.equal(mine.to_dense(), kfac.to_dense())
    exact = kf.estimate(model, kf.Categorical(), data, approximation="xkfac", source="exact")
    assert torch.equal(exact.to_dense(), kf.estimate(model, kf.Categorical(), data, source="exact").to_dense())


# ------------------------------------------------------------------------------------------------ norms, errors
@pytest.mark.parametrize("norm", ["unitwise", "full"])
def test_blocks_of_normalisation_layers_are_exact(norm: str) -> None:
    model, x = perceptron(), inputs(8)
    curvature = kf.estimate(model, kf.Categorical(), (x, None), approximation="xkfac", source=OneByOne(), norm=norm)
    errors = block_errors(curvature, model, kf.reference.ggn(model, kf.Categorical(), x))
    assert isinstance(curvature.blocks["1"], Dense)
    assert errors["1"] < 1e-10
    assert errors["6"] < 1e-10
    naive = kf.estimate(model, kf.Categorical(), (x, None), source=OneByOne(), norm=norm)
    assert block_errors(naive, model, kf.reference.ggn(model, kf.Categorical(), x))["1"] > 0.1


def test_errors_are_below_those_of_kfac_at_initialisation() -> None:
    """The first table of docs/methods/xkfac.md: weights of variance one over the fan-in, inputs of mean one."""
    model, x = perceptron(), draw(32, 6, seed=1) + 1
    with torch.no_grad():
        for index in LINEAR:
            linear = model[index]
            linear.weight.copy_(draw(*linear.weight.shape, seed=index) / linear.in_features**0.5)
            linear.bias.zero_()
    exact = kf.reference.ggn(model, kf.Categorical(), x)
    mine, naive = (
        block_errors(
            kf.estimate(model, kf.Categorical(), (x, None), approximation=name, source=OneByOne()), model, exact
        )
        for name in ("xkfac", "kfac")
    )
    assert mine["8"] == pytest.approx(naive["8"], rel=1e-12)
    assert mine["0"] < 0.5 * naive["0"]
    assert mine["3"] < naive["3"]
    assert mine["5"] < 0.7 * naive["5"]


# ------------------------------------------------------------------------------------------------ convolutions
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_convolutions_sum_over_positions(sharing: str) -> None:
    """Equations (75) to (79), and the same with positions averaged and summed first, by loops over positions."""
    norm = nn.BatchNorm2d(3)
    model = double(
        nn.Sequential(
            nn.Conv2d(2, 3, 2, padding=1),
            norm,
            nn.Tanh(),
            nn.Conv2d(3, 2, 2),
            nn.BatchNorm2d(2),
            nn.Flatten(),
            nn.Linear(8, 3),
        )
    )
    x, count = draw(4, 2, 2, 2) + 0.5, 4
    estimator = gathered(model, x, source=OneByOne(), sharing=sharing)
    with record(estimator.adaptation.adapters) as tape:
        out = model(x)
    rows = nn.functional.unfold(x, 2, padding=1).transpose(1, 2)
    rows = torch.cat((rows, rows.new_ones(*rows.shape[:2], 1)), 2)  # [N, S, d_in]
    pulls = [
        tape.pull(out, seed.cotangent)["0"].flatten(2).transpose(1, 2)
        for seed in OneByOne().seeds(kf.Categorical(), out.detach(), None, None)
    ]  # type: ignore[arg-type]
    if sharing == "reduce":
        rows, pulls = rows.mean(1, keepdim=True), [v.sum(1, keepdim=True) for v in pulls]
    positions = rows.shape[1]
    a = sum(rows[:, s].T @ rows[:, s] / count for s in range(positions))
    means = sum(torch.outer(rows[:, s].mean(0), rows[:, s].mean(0)) for s in range(positions))
    first = sum(v[:, s].T @ v[:, s] for v in pulls for s in range(positions)) / count / positions
    second = (
        sum(torch.outer(v[:, s].sum(0), v[:, s].sum(0)) for v in pulls for s in range(positions)) / count / positions
    )
    wanted = torch.kron(first, a) + torch.kron(second - first, count * means - a) / (count - 1)
    found = statistic(estimator, "0")
    assert found.coupling is (Coupling.DIRECT if sharing == "reduce" else Coupling.GENERAL)
    assert relative(found.block().to_dense(), wanted) < 1e-12
    if sharing == "reduce":
        assert float(second.norm()) < 1e-12 * float(first.norm())


@pytest.mark.parametrize("make", ["perceptron", "convolutions"])
def test_matched_traces_are_exact_and_everything_else_is_xkfac(make: str) -> None:
    torch.manual_seed(2)
    if make == "perceptron":
        model, x = perceptron(), inputs(8)
    else:
        model = nn.Sequential(
            nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten()
        )
        model, x = double(model.append(nn.Linear(12, 3))), torch.randn(6, 2, 4, 4, dtype=torch.float64) + 1
    exact = kf.reference.ggn(model, kf.Categorical(), x)
    options = {"source": OneByOne()}
    found = kf.estimate(model, kf.Categorical(), (x, None), approximation="xkfac_trace", **options).blocks
    plain = kf.estimate(model, kf.Categorical(), (x, None), approximation="xkfac", **options).blocks
    start, traces = 0, {}
    for name, parameter in model.named_parameters():
        layer, part = name.split(".")[0], exact.diagonal()[start : start + parameter.numel()].sum()
        traces[layer] = traces.get(layer, 0.0) + float(part)
        start += parameter.numel()
    for name, block in found.items():
        if name == list(traces)[-1] or not isinstance(plain[name], Kronecker | KroneckerSum):
            assert torch.equal(block.to_dense(), plain[name].to_dense())
            continue
        assert float(block.trace()) == pytest.approx(traces[name], rel=1e-10)
        if make == "perceptron":
            ratio = block.trace() / plain[name].trace()
            torch.testing.assert_close(block.to_dense(), ratio * plain[name].to_dense(), rtol=1e-10, atol=1e-14)


def test_matched_traces_are_unbiased_from_sampled_labels() -> None:
    model, x = perceptron(), inputs(8)
    options = {"approximation": "xkfac_trace"}
    exact = kf.estimate(model, kf.Categorical(), (x, None), source=OneByOne(), **options)
    found = kf.estimate(model, kf.Categorical(), (x, None), source="sampled", samples=500, seed=0, **options)
    for name in ("0", "3", "5"):
        assert float(found.blocks[name].trace()) == pytest.approx(float(exact.blocks[name].trace()), rel=0.2)


def test_groups_and_transposed_convolutions_have_blocks_of_their_own() -> None:
    model = double(
        nn.Sequential(
            nn.Conv2d(4, 4, 2, groups=2),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 3, 2, stride=2),
            nn.Tanh(),
            nn.BatchNorm2d(3),
            nn.Flatten(),
            nn.Linear(48, 3),
        )
    )
    curvature = kf.estimate(model, kf.Categorical(), (draw(4, 4, 3, 3), None), approximation="xkfac", samples=2)
    for name in ("0", "2"):
        block = curvature.blocks[name]
        assert isinstance(block, KroneckerSum)
        assert float(torch.linalg.eigvalsh(block.to_dense())[0]) > -1e-12 * float(block.trace())


# ------------------------------------------------------------------------------------------------ consumers
def test_save_and_load(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model, x = perceptron(), inputs(8)
    curvature = kf.estimate(model, kf.Categorical(), (x, None), approximation="xkfac")
    kf.save(curvature, tmp_path / "xkfac.safetensors")
    again = kf.load(tmp_path / "xkfac.safetensors", model)
    assert isinstance(again.blocks["3"], KroneckerSum)
    assert torch.equal(again.to_dense(), curvature.to_dense())


def test_coverage_and_verify_know_that_examples_are_coupled() -> None:
    model, x = perceptron(), inputs(8)
    rows = {row.parameter: row for row in kf.coverage(model, approximation="xkfac").rows}
    assert rows["3.weight"].block == "kronecker sum"
    assert rows["3.weight"].factor_bytes == 8 * 2 * (9**2 + 7**2)
    assert "batch norm in train mode couples" not in rows["3.weight"].reason
    assert rows["1.weight"].state == "exact"
    report = kf.verify(model, kf.Categorical(), (x, None), approximation="xkfac", samples=64)
    assert any("and so do the blocks" in note for note in report.notes)
    assert {row.layer: row.block for row in report.rows}["3"] == "kronecker_sum"


def train(optimizer: kf.optim.KFAC, model: nn.Module, steps: range) -> list[float]:
    x = inputs(16)
    y, losses = (x[:, 0] > 0.5).long() + 2 * (x[:, 1] > 0.5).long(), []
    for _ in steps:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("rule", ["factored", "exact"])
def test_the_optimiser_trains_and_resumes_bit_for_bit(rule: str, tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, kf.optim.KFAC]:
        model = perceptron()
        options = {"stats_every": 2, "invert_every": 3, "damping_rule": rule, "damping": 1e-2}
        return model, kf.optim.KFAC(model, kf.Categorical(), lr=0.2, approximation="xkfac", **options)

    model, optimizer = make()
    before = train(optimizer, model, range(7))
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    curvature = optimizer.curvature().to_dense()
    after = train(optimizer, model, range(7, 30))
    assert after[-1] < 0.5 * before[0]
    other, resumed = make()
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    assert torch.equal(resumed.curvature().to_dense(), curvature)
    assert train(resumed, other, range(7, 30)) == after
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


# ------------------------------------------------------------------------------------------------ refused
def test_eval_mode_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"in eval mode.*XK-FAC is K-FAC: use approximation='kfac', or model.train\(\)"
    ):
        gathered(perceptron().eval(), inputs(4))


def test_a_batch_of_one_is_refused() -> None:
    model = double(nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 3)))
    with pytest.raises(ValueError, match=r"batch of one.*drop_last=True"):
        gathered(model, draw(1, 2, 4, 4))


def test_synchronised_batch_norm_is_refused_by_name() -> None:
    model = double(nn.Sequential(nn.Linear(6, 5), nn.SyncBatchNorm(5), nn.Linear(5, 3)))
    with pytest.raises(ValueError, match=r"'1' is an nn.SyncBatchNorm in train mode"):
        gathered(model, inputs(4))


def test_an_embedding_behind_which_batch_norm_lies_is_refused_by_name() -> None:
    model = double(nn.Sequential(nn.Embedding(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    with pytest.raises(ValueError, match=r"behind the embedding '0'.*freeze it, or use 'kfac'"):
        gathered(model, torch.arange(5))
    model = double(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)))
    assert gathered(model, torch.arange(5)).curvature().blocks["0"].kind == "diagonal_kronecker"


@pytest.mark.parametrize("source", ["exact", "empirical", "recursive", "forward_only"])
def test_sources_without_independent_signs_are_refused_by_name(source: str) -> None:
    with pytest.raises(ValueError, match=source):
        gathered(perceptron(), inputs(4), source=source)


class Functional(nn.Module):
    """Batch norm that is no module: sources do not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.batch_norm(self.first(x).tanh(), None, None, training=True))


@pytest.mark.parametrize("source", ["exact", "empirical"])
def test_exact_sources_are_refused_where_the_graph_alone_shows_the_coupling(source: str) -> None:
    model = double(Functional())
    assert statistic(gathered(model, inputs(4)), "first").coupling is Coupling.GENERAL
    with pytest.raises(ValueError, match=f"source='{source}' pulls all examples at once without independent signs"):
        gathered(model, inputs(4), source=source)


class Merged(nn.Module):
    """Positions in the batch dimension of the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x.reshape(-1, 3)).reshape(len(x), -1)))


def test_a_layer_whose_examples_are_not_its_first_dimension_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"approximation='xkfac' needs the examples one by one.*'first'"):
        gathered(double(Merged()), inputs(4))


def test_a_norm_that_changes_its_mode_between_batches_is_refused_and_changes_nothing() -> None:
    model = perceptron()
    estimator = gathered(model, inputs(4))
    before = estimator.curvature().to_dense()
    model[6].eval()
    with record(estimator.adaptation.adapters) as tape:
        out = model(inputs(4))
    with pytest.raises(ValueError, match=r"Layer '3'.*no longer what it was"):
        estimator.update(tape, out)
    assert torch.equal(estimator.curvature().to_dense(), before)


def test_statistics_without_a_graph_are_refused() -> None:
    estimator = gathered(perceptron(), inputs(4))
    statistic(estimator, "3").coupling = None
    with record(estimator.adaptation.adapters) as tape:
        out = estimator.model(inputs(4))
    samples = next(iter(estimator.source.samples(tape, kf.Categorical(), out)))
    with pytest.raises(RuntimeError, match="needs the graph of the forward pass"):
        statistic(estimator, "3").add(next(sample for sample in samples if sample.layer.name == "3"))


def test_batches_differ() -> None:
    """The helper's inputs: seeds give other numbers, or the pooled test would compare equal batches."""
    for first, second in pairwise((inputs(4, 1), inputs(4, 2), inputs(4, 3))):
        assert relative(first, second) > 0.1
