"""Statistics of the first examples of a forward are those of these examples alone, and cost accordingly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.exactness_helpers import double, draw
from tests.optim.gathering_helpers import factors, make, same
from tests.optim.hand_kfac import network
from tests.optim.sub_batch_helpers import APART, CUT, normalised, tensors
from torch import Tensor, nn

import kronfac as kf
from kronfac.estimator import Estimator
from kronfac.tape import record


class Shared(nn.Module):
    """Linear layers whose weights positions share, an embedding, a table of positions, and layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(7, 4), nn.Embedding(5, 4)
        self.norm, self.layer, self.head = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 3)
        double(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.places(torch.arange(x.shape[1]))
        return self.head(self.layer(self.norm(h)).tanh().mean(1))


def convolutions() -> nn.Module:
    return double(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, stride=2),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 4, 2, groups=2),
            nn.GroupNorm(2, 4),
            nn.Conv2d(4, 4, 3, groups=2),
            nn.Flatten(),
            nn.Linear(16, 3),
        )
    )


def words() -> Tensor:
    return torch.randint(7, (8, 5), generator=torch.Generator().manual_seed(3))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any]]] = {
    "linear": (network, lambda: draw(8, 3), {}),
    "convolutions": (convolutions, lambda: draw(8, 2, 5, 5), {}),
    "shared": (Shared, words, {}),
    "shared, reduced": (Shared, words, {"sharing": "reduce", "norm": "full"}),
}
LIKELIHOODS: dict[str, kf.Likelihood] = {
    "mean": kf.Categorical(),
    "sum": kf.Categorical(reduction="sum"),
    "squares": kf.Gaussian(reduction="batchmean"),
}


def check_alone(model: nn.Module, x: Tensor, m: int, likelihood: kf.Likelihood, **options: Any) -> None:
    """Compare blocks with those of the first examples, times N/m where the loss is a sum."""
    options = {"source": "exact", **options}
    optimizer = make(model, likelihood=likelihood, stats_examples=m, **options)
    model(x)
    # Without a pull the output factor is the identity, of a sum as well.
    scale = len(x) / m if likelihood.reduction == "sum" and options["source"] != "forward_only" else 1.0
    wanted = tensors(kf.estimate(model, likelihood, (x[:m], None), seed=0, **options).blocks, scale)
    found = tensors(optimizer.curvature().blocks)
    same(found, wanted, 1e-10)


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("reduction", LIKELIHOODS)
@pytest.mark.parametrize("source", ["sampled", "exact", "forward_only"])
@pytest.mark.filterwarnings("ignore::kronfac.CoverageWarning")
def test_a_forward_of_its_own_is_the_estimate_of_the_first_examples(case: str, reduction: str, source: str) -> None:
    """With the labels that the same generator gives, too."""
    build, data, options = MODELS[case]
    check_alone(build(), data(), APART, LIKELIHOODS[reduction], source=source, **options)


@pytest.mark.parametrize("case", ["linear", "convolutions"])
@pytest.mark.parametrize("reduction", LIKELIHOODS)
def test_a_cut_is_the_estimate_of_the_first_examples(case: str, reduction: str) -> None:
    build, data, options = MODELS[case]
    check_alone(build(), data(), CUT, LIKELIHOODS[reduction], source="exact", **options)


@pytest.mark.parametrize("m", [APART, CUT])
@pytest.mark.parametrize("approximation", ["diagonal", "dense", "tkfac", "prong", "sua"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_approximation_takes_part_of_a_batch(approximation: str, reduction: str, m: int) -> None:
    check_alone(convolutions(), draw(8, 2, 5, 5), m, LIKELIHOODS[reduction], approximation=approximation)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_recursion_takes_a_forward_of_its_own_whatever_the_part(reduction: str) -> None:
    for m in (APART, CUT):
        check_alone(network(), draw(8, 3), m, LIKELIHOODS[reduction], source="recursive")


def by_hand(model: nn.Module, x: Tensor, m: int, likelihood: kf.Likelihood) -> dict[str, Tensor]:
    """Factors of the whole batch's pull, cut to the first examples, for layers of one position or many."""
    estimator = Estimator(model, likelihood)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with record(estimator.adaptation.adapters) as tape:
        z = model(x)
    cotangent = likelihood.sample_cotangents(z.detach(), None, torch.Generator().manual_seed(0))
    found, pulled = {}, tape.pull(z, cotangent)
    for name, buffer in buffers.items():
        model.get_buffer(name).copy_(buffer)
    for name, g in pulled.items():
        adapter, inputs = tape.calls[name].adapter, tape.calls[name].input
        if adapter.unit_wise:
            continue
        a, rows = adapter.expand(inputs)[:m].flatten(0, 1), adapter.expand_cotangents(g)[:m].flatten(0, 1)
        found[f"{name}.input"] = a.T @ a / len(a)
        found[f"{name}.output"] = rows.T @ rows / (m / len(x) if likelihood.reduction == "sum" else m)
    return found


@pytest.mark.parametrize("m", [2, APART, CUT, 7])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_under_batch_norm_the_function_is_that_of_the_whole_batch(reduction: str, m: int) -> None:
    likelihood, x = LIKELIHOODS[reduction], draw(8, 1, 4, 4)
    model, plain = normalised(), normalised()
    wanted = by_hand(model, x, m, likelihood)
    whole = make(plain, likelihood=likelihood, source="sampled")
    optimizer = make(model, likelihood=likelihood, source="sampled", stats_examples=m)
    outputs = model(x), plain(x)
    assert torch.equal(*outputs)
    found, all_of_them = factors(optimizer), factors(whole)
    same({name: found[name] for name in wanted}, wanted, 1e-10)
    norms = {name: tensor for name, tensor in all_of_them.items() if name not in wanted}
    assert len(norms) == 2
    same({name: found[name] for name in norms}, norms, 1e-12)  # these normalise over all examples
    for name, buffer in plain.named_buffers():  # running statistics move once
        assert torch.equal(model.get_buffer(name), buffer)


@pytest.mark.parametrize("m", [8, 9, 1000])
def test_as_many_examples_as_there_are_is_all_of_them(m: int) -> None:
    one, other = network(), network()
    optimizers = make(one, source="sampled"), make(other, source="sampled", stats_examples=m)
    for model in (one, other):
        model(draw(8, 3))
    same(factors(optimizers[1]), factors(optimizers[0]), 0.0)


@pytest.mark.parametrize("m", [APART, CUT])
def test_captured_outputs_are_cut_with_their_targets(m: int) -> None:
    likelihood = kf.Categorical(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), ignore_index=-100)
    model, x, y = network(), draw(8, 3), torch.tensor([0, -100, 1, 2, -100, 2, 1, 0])
    for targets in (y, (y, torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0, 3.0, 1.0, 1.0]))):
        first = targets[:m] if isinstance(targets, Tensor) else tuple(part[:m] for part in targets)
        optimizer = make(model, likelihood=likelihood, stats_examples=m)
        with optimizer.capture() as capture:
            capture(model(x), targets)
        found = tensors(optimizer.curvature().blocks)
        same(found, tensors(kf.estimate(model, likelihood, (x[:m], first), source="exact").blocks), 1e-10)


def test_captured_outputs_whose_first_terms_are_all_ignored_are_refused() -> None:
    model, y = network(), torch.tensor([-100, -100, 1, 2, 0, 2, 1, 0])
    optimizer = make(model, likelihood=kf.Categorical(ignore_index=-100), stats_examples=2)
    with optimizer.capture() as capture, pytest.raises(ValueError, match="No term of the first 2 examples counts"):
        capture(model(draw(8, 3)), y)


def test_a_recursion_cannot_be_cut() -> None:
    model = network()
    optimizer = make(model, source="recursive", stats_examples=APART)
    with optimizer.capture() as capture, pytest.raises(ValueError, match="needs a forward of its own"):
        capture(model(draw(8, 3)))


@pytest.mark.parametrize("m", [2, APART])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_micro_batch_gives_its_first_examples(reduction: str, m: int) -> None:
    """A part of each stands for it: of a sum every one is raised by itself."""
    likelihood, x = LIKELIHOODS[reduction], draw(12, 3)
    model, parts = network(), x.split([7, 5])
    optimizer = make(model, likelihood=likelihood, stats_examples=m)
    for part in parts:
        model(part)
    found = factors(optimizer)
    each = [kf.estimate(model, likelihood, (p[:m], None), source="exact", approximation="kfac").blocks for p in parts]
    for name in each[0]:
        a, b = (blocks[name].tensors() for blocks in each)
        torch.testing.assert_close(found[f"{name}.input"], (a["input"] + b["input"]) / 2, rtol=1e-10, atol=1e-10)
        raised = [len(p) / m if reduction == "sum" else 0.5 for p in parts]
        wanted = raised[0] * a["output"] + raised[1] * b["output"]
        torch.testing.assert_close(found[f"{name}.output"], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("m", [None, APART, CUT])
@pytest.mark.parametrize("reduction", LIKELIHOODS)
def test_the_automatic_clip_counts_the_terms_of_all_examples(reduction: str, m: int | None) -> None:
    model = network()
    optimizer = make(model, likelihood=LIKELIHOODS[reduction], stats_examples=m, source="sampled")
    model(draw(8, 3))
    assert optimizer._estimator.terms == pytest.approx({"mean": 1.0, "sum": 8.0, "squares": 3.0}[reduction])
