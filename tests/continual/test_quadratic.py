"""Penalties against dense matrices in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

import kronfac as kf
from kronfac.blocks import Kronecker, KroneckerSum
from kronfac.continual import PenaltySum, QuadraticPenalty, RecentredDecay, recentred_decay
from kronfac.continual.combine import nearest_sum
from kronfac.storage import StorageError

APPROXIMATIONS = ["kfac", "diagonal", "dense", "ekfac", "tkfac", "kfac_tridiagonal"]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 5, generator=generator).double(), torch.randint(3, (12,), generator=generator)


def curvature_of(model: nn.Module, approximation: str = "kfac", seed: int = 0):
    return kf.estimate(model, kf.Categorical(), data(seed), approximation=approximation, source="exact")


def vector_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def moved(model: nn.Module, seed: int = 7) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return other


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_value_gradient_and_hessian_are_those_of_the_dense_matrix(approximation: str) -> None:
    model = network()
    curvature = curvature_of(model, approximation)
    penalty = QuadraticPenalty(curvature, strength=2.5)
    start = vector_of(model)
    other = moved(model)
    delta, dense = vector_of(other) - start, curvature.to_dense()
    value = penalty(other)
    torch.testing.assert_close(value.detach(), 0.5 * 2.5 * delta @ dense @ delta, rtol=1e-10, atol=0)
    parameters = list(other.parameters())
    gradient = torch.autograd.grad(value, parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    torch.testing.assert_close(flat.detach(), 2.5 * dense @ delta, rtol=1e-10, atol=1e-13)
    direction = torch.randn_like(delta)
    second = torch.autograd.grad(flat @ direction, parameters)
    torch.testing.assert_close(
        torch.cat([g.flatten() for g in second]), 2.5 * dense @ direction, rtol=1e-10, atol=1e-13
    )


def test_the_anchor_is_a_copy_of_this_moment() -> None:
    model = network()
    curvature = curvature_of(model)
    penalty = QuadraticPenalty(curvature)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert penalty(model).item() == 0
    with torch.no_grad():
        model[0].weight.add_(1.0)
    assert penalty(model).item() > 0
    assert {n: torch.equal(t, before[n]) for n, t in penalty.anchor.items()} == dict.fromkeys(before, True)
    elsewhere = QuadraticPenalty(curvature, moved(model))
    assert not torch.equal(elsewhere.anchor["0.weight"], before["0.weight"])
    assert QuadraticPenalty(curvature, before)(before).item() == 0


def test_the_gradient_costs_no_second_product(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    penalty = QuadraticPenalty(curvature_of(model))
    calls = []
    original = Kronecker.matmul
    monkeypatch.setattr(Kronecker, "matmul", lambda self, v: calls.append(1) or original(self, v))
    penalty(moved(model)).backward()
    assert len(calls) == 2  # one for each layer


def test_mappings_and_function_transforms() -> None:
    model = network()
    penalty = QuadraticPenalty(curvature_of(model, "ekfac"))
    other = moved(model)
    live = {name: p.detach() for name, p in other.named_parameters()}
    torch.testing.assert_close(penalty(live), penalty(other).detach())
    found = grad(lambda p: penalty(p))(live)
    expected = torch.autograd.grad(penalty(other), list(other.parameters()))
    for one, two in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(one, two)
    assert functional_call(other, live, (data()[0],)).shape == (12, 3)


def test_sums_have_an_anchor_for_each_task() -> None:
    model, later = network(), moved(network())
    one, two = QuadraticPenalty(curvature_of(model)), QuadraticPenalty(curvature_of(later, seed=1), strength=3.0)
    three = recentred_decay(model, 0.1)
    other = moved(model, 9)
    total = one + two + three
    assert isinstance(total, PenaltySum)
    assert len(total) == len(sum([one, two, three])) == 3
    torch.testing.assert_close(total(other), one(other) + two(other) + three(other))
    torch.testing.assert_close((2.0 * total)(other), 2 * total(other))
    torch.testing.assert_close((one * 0.0)(other).item(), 0.0)
    with pytest.raises(TypeError):
        _ = one + 1.0
    with pytest.raises(ValueError, match="at least one"):
        PenaltySum([])


@pytest.mark.parametrize("approximation", ["kfac", "diagonal", "dense", "ekfac"])
def test_running_mean_around_the_newest_optimum(approximation: str) -> None:
    models = [network(), moved(network(), 1), moved(network(), 2)]
    curvatures = [curvature_of(model, approximation, seed) for seed, model in enumerate(models)]
    penalty = QuadraticPenalty(curvatures[0], strength=2.0)
    for curvature in curvatures[1:]:
        penalty = penalty.update(curvature)
    assert penalty.tasks == 3
    assert len(penalty.parts) == (1 if approximation in {"diagonal", "dense"} else 3)
    other = moved(models[2], 5)
    delta = vector_of(other) - vector_of(models[2])
    mean = sum(c.to_dense() for c in curvatures) / 3
    torch.testing.assert_close(penalty(other).detach(), delta @ mean @ delta, rtol=1e-10, atol=0)


def test_decay_forgets_older_tasks() -> None:
    models = [network(), moved(network(), 1), moved(network(), 2)]
    curvatures = [curvature_of(model, "diagonal", seed) for seed, model in enumerate(models)]
    penalty = QuadraticPenalty(curvatures[0]).update(curvatures[1], decay=0.9).update(curvatures[2], decay=0.9)
    other = moved(models[2], 5)
    delta = vector_of(other) - vector_of(models[2])
    total = 0.81 * curvatures[0].to_dense() + 0.9 * curvatures[1].to_dense() + curvatures[2].to_dense()
    torch.testing.assert_close(penalty(other).detach(), 0.5 * delta @ total @ delta, rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\]"):
        penalty.update(curvatures[0], decay=1.5)


def random_factors(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, g = (torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (4, 3))
    return a @ a.T, g @ g.T


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, 0.1), (0.0, 1.0)])
def test_nearest_product_is_the_best_of_rank_one(weights: tuple[float, float]) -> None:
    (a, g), (b, h) = random_factors(0), random_factors(1)
    inputs, outputs = nearest_sum((a.flatten(), b.flatten()), (g.flatten(), h.flatten()), weights)
    rearranged = weights[0] * torch.outer(g.flatten(), a.flatten()) + weights[1] * torch.outer(h.flatten(), b.flatten())
    u, s, v = torch.linalg.svd(rearranged)
    torch.testing.assert_close(torch.outer(outputs, inputs), s[0] * torch.outer(u[:, 0], v[0]), rtol=1e-10, atol=1e-10)
    for factor in (inputs.view(4, 4), outputs.view(3, 3)):
        assert torch.linalg.eigvalsh(factor).min() > -1e-12


@pytest.mark.parametrize(("approximation", "combine"), [("kfac", "factors"), ("kfac", "nearest"), ("tkfac", "nearest")])
def test_one_product_stands_for_several_tasks(approximation: str, combine: str) -> None:
    model, later = network(), moved(network(), 1)
    first, second = curvature_of(model, approximation), curvature_of(later, approximation, 1)
    penalty = QuadraticPenalty(first).update(second, combine=combine)
    assert len(penalty.parts) == 1
    exact = (first.to_dense() + second.to_dense()) / 2
    error = torch.linalg.norm(penalty.parts[0][1].to_dense() - exact) / torch.linalg.norm(exact)
    assert error < 0.2
    if combine == "nearest" and approximation == "kfac":
        averaged = QuadraticPenalty(first).update(second, combine="factors").parts[0][1].to_dense()
        assert torch.linalg.norm(penalty.parts[0][1].to_dense() - exact) <= torch.linalg.norm(averaged - exact)
    # the same curvature twice is left as it is
    same = QuadraticPenalty(first).update(first, combine=combine).parts[0][1].to_dense()
    torch.testing.assert_close(same, first.to_dense(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("combine", ["factors", "nearest"])
def test_two_products_stand_for_several_tasks_of_xkfac(combine: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    found = [
        kf.estimate(model.double(), kf.Categorical(), data(seed), approximation="xkfac", samples=8) for seed in (0, 1)
    ]
    penalty = QuadraticPenalty(found[0]).update(found[1], combine=combine)
    ((weight, kept),) = penalty.parts
    block = kept.blocks["0"]
    assert weight == 1.0
    assert isinstance(block, KroneckerSum)
    first, second = (curvature.blocks["0"] for curvature in found)
    for mine, left, right in zip(terms(block), terms(first), terms(second), strict=True):
        exact = (left.to_dense() + right.to_dense()) / 2
        assert torch.linalg.norm(mine.to_dense() - exact) < 0.5 * torch.linalg.norm(exact)
        assert torch.linalg.eigvalsh(mine.to_dense()).min() > -1e-12
    same = QuadraticPenalty(found[0]).update(found[0], combine=combine).parts[0][1].to_dense()
    torch.testing.assert_close(same, found[0].to_dense(), rtol=1e-9, atol=1e-12)


def terms(block: KroneckerSum) -> tuple[Kronecker, Kronecker]:
    return Kronecker(block.input, block.output), Kronecker(block.second_input, block.second_output)


def test_what_cannot_be_combined_is_named() -> None:
    model = network()
    ekfac, kfac = curvature_of(model, "ekfac"), curvature_of(model)
    with pytest.raises(NotImplementedError, match=r"layer '0'.*EigenKronecker.*combine=\"exact\""):
        QuadraticPenalty(ekfac).update(ekfac, combine="nearest")
    with pytest.raises(ValueError, match="combine='all' is unknown"):
        QuadraticPenalty(kfac).update(kfac, combine="all")
    assert len(QuadraticPenalty(ekfac).update(kfac).parts) == 2
    other = nn.Sequential(nn.Linear(5, 3)).double()
    with pytest.raises(ValueError, match="has a block for '2'"):
        QuadraticPenalty(kfac).update(curvature_of(other))


class Scaled(nn.Module):
    """A network with a parameter that no block covers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.factor = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.factor


def test_parameters_without_curvature_are_free_or_held_by_rest() -> None:
    model = Scaled()
    with pytest.warns(kf.CoverageWarning, match="factor"):
        curvature = curvature_of(model)
    free, held = QuadraticPenalty(curvature), QuadraticPenalty(curvature, model, strength=2.0, rest=0.5)
    with torch.no_grad():
        model.factor.add_(2.0)
    assert free(model).item() == 0
    torch.testing.assert_close(held(model).item(), 2.0 * 0.5 * 0.5 * 3 * 4.0)
    with pytest.raises(ValueError, match="pass model="):
        QuadraticPenalty(curvature, rest=0.5)
    with pytest.raises(ValueError, match="needs model="):
        held.update(curvature)
    assert held.update(curvature, model)(model).item() == 0
    with pytest.raises(ValueError, match="every trainable parameter has curvature"):
        QuadraticPenalty(curvature_of(model.body), model.body, rest=1.0)


def test_wrong_models_are_refused_by_name() -> None:
    model = network()
    penalty = QuadraticPenalty(curvature_of(model))
    renamed = nn.Sequential()
    renamed.add_module("first", model[0])
    renamed.add_module("2", model[2])
    with pytest.raises(ValueError, match=r"lacks '0.weight', '0.bias' \(it has 'first.weight', 'first.bias'"):
        penalty(renamed)
    wider = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6)).double()
    with pytest.raises(ValueError, match=r"'2.weight' has shape \(6, 4\) instead of \(3, 4\)"):
        penalty(wider)
    with pytest.raises(ValueError, match=r"is on cpu .* use penalty\.to"):
        penalty(copy.deepcopy(model).to("meta"))
    with pytest.raises(TypeError, match="model must be"):
        penalty(3)
    extended = nn.Sequential(*model, nn.Linear(3, 2).double())
    assert penalty(extended).item() == 0  # further parameters are free


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strength": -1.0}, ValueError, "strength must be finite and not negative"),
        ({"strength": float("nan")}, ValueError, "strength must be"),
        ({"strength": "1"}, TypeError, "strength must be a number"),
        ({"rest": -1.0}, ValueError, "rest must be"),
    ],
)
def test_bad_factors(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        QuadraticPenalty(curvature_of(network()), **arguments)


def test_only_curvature_is_taken() -> None:
    with pytest.raises(TypeError, match=r"curvature must be what kronfac\.estimate"):
        QuadraticPenalty(torch.eye(3))


def test_conversion_and_half_precision_models() -> None:
    model = network()
    penalty = QuadraticPenalty(curvature_of(model), strength=2.0)
    other = moved(model)
    single = penalty.to(dtype=torch.float32)
    assert single(other).dtype == torch.float32
    torch.testing.assert_close(single(other).double(), penalty(other), rtol=1e-5, atol=0)
    half = copy.deepcopy(other).bfloat16()
    value = single(half)
    value.backward()
    assert value.dtype == torch.float32
    assert half[0].weight.grad.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(single(other.float()), penalty(other.double()).float(), rtol=1e-5, atol=0)
    with pytest.raises(NotImplementedError, match="BlockTridiagonal"):
        QuadraticPenalty(curvature_of(model, "kfac_tridiagonal")).to(dtype=torch.float32)


def test_saved_penalties_come_back_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model, later = network(), moved(network(), 1)
    first = QuadraticPenalty(curvature_of(model), strength=2.0)
    second = first.update(curvature_of(later, "ekfac", 1), decay=0.5)
    total = second + QuadraticPenalty(curvature_of(model, "dense")) + recentred_decay(later, 0.25)
    other = moved(model, 3)
    for name, penalty in {"one": first, "several": second, "sum": total}.items():
        kf.continual.save(penalty, tmp_path / name)
        again = kf.continual.load(tmp_path / name, network(5))
        assert type(again) is type(penalty)
        assert torch.equal(again(other), penalty(other))
    held = Scaled()
    with pytest.warns(kf.CoverageWarning):
        rest = QuadraticPenalty(curvature_of(held), held, rest=0.5)
    kf.continual.save(rest, tmp_path / "rest")
    with torch.no_grad():
        held.factor.add_(1.0)
    assert kf.continual.load(tmp_path / "rest", Scaled())(held).item() == rest(held).item() > 0
    assert kf.continual.load(tmp_path / "several", model).tasks == 2


def normed(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()


def test_penalties_that_couple_layers_are_dense_ones_add_up_and_are_saved(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    models = [normed(), moved(normed(), 1)]
    first, second = (
        kf.estimate(model, kf.Categorical(), data(i), approximation="kkfac", source="sampled", seed=i)
        for i, model in enumerate(models)
    )
    both = QuadraticPenalty(first, strength=2.0).update(second, decay=0.5)
    assert len(both.parts) == 2  # exactly: a sum of Khatri-Rao products is none
    other = moved(models[1], 3)
    delta = vector_of(other) - vector_of(models[1])
    dense = 0.5 * first.to_dense() + second.to_dense()
    gaps = dense.clone()
    gaps[:24, :24] = gaps[-15:, -15:] = 0
    assert gaps[:24, -15:].abs().max() > 1e-6  # the two linear layers are coupled
    torch.testing.assert_close(both(other).item(), (delta @ dense @ delta).item(), rtol=1e-10, atol=0)
    kf.continual.save(both + QuadraticPenalty(first), tmp_path / "sum")
    again = kf.continual.load(tmp_path / "sum", normed(5))
    assert torch.equal(again(other), (both + QuadraticPenalty(first))(other))
    with pytest.raises(NotImplementedError, match='needs block-diagonal curvatures; combine="exact" takes all'):
        both.update(second, combine="nearest")


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = network()
    curvature = curvature_of(model)
    kf.save(curvature, tmp_path / "curvature")
    kf.continual.save(QuadraticPenalty(curvature), tmp_path / "penalty")
    with pytest.raises(StorageError, match="no penalty saved by kronfac"):
        kf.continual.load(tmp_path / "curvature", model)
    with pytest.raises(StorageError, match="no curvature saved by kronfac"):
        kf.load(tmp_path / "penalty", model)
    torch.save({"a": 1}, tmp_path / "pickle")
    with pytest.raises(StorageError, match="damaged, or no penalty"):
        kf.continual.load(tmp_path / "pickle", model)
    whole = (tmp_path / "penalty").read_bytes()
    (tmp_path / "short").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StorageError, match="damaged"):
        kf.continual.load(tmp_path / "short", model)
    with pytest.raises(StorageError, match=r"layer '2'"):
        kf.continual.load(tmp_path / "penalty", nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6)))
    with pytest.raises(FileNotFoundError, match="no file"):
        kf.continual.load(tmp_path / "nothing", model)
    with pytest.raises(TypeError, match="a penalty with a BlockTridiagonal cannot be saved: only"):
        kf.continual.save(QuadraticPenalty(curvature_of(model, "kfac_tridiagonal")), tmp_path / "coupled")


def test_embeddings_norms_and_convolutions() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.conv = nn.Conv1d(4, 4, 2, groups=2)
            self.norm = nn.LayerNorm(4)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.conv(self.embedding(x).mT).mean(-1)))

    torch.manual_seed(0)
    model = Mixed().double()
    pair = (torch.randint(5, (8, 6)), torch.randint(3, (8,)))
    curvature = kf.estimate(model, kf.Categorical(), pair, source="exact")
    penalty, other = QuadraticPenalty(curvature), moved(model)
    delta = vector_of(other) - vector_of(model)
    torch.testing.assert_close(penalty(other).detach(), 0.5 * delta @ curvature.to_dense() @ delta, rtol=1e-10, atol=0)


def test_decay_towards_the_start() -> None:
    model = network()
    decay = recentred_decay(model, 0.5)
    other = moved(model)
    difference = vector_of(other) - vector_of(model)
    value = decay(other)
    torch.testing.assert_close(value.item(), 0.25 * difference.square().sum().item())
    value.backward()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in other.parameters()]), 0.5 * difference)
    assert isinstance(decay, RecentredDecay)
    some = recentred_decay(model, 1.0, names=["0.bias"])
    assert list(some.anchor) == ["0.bias"]
    assert some.to(dtype=torch.float32)(other).dtype == torch.float32
    with pytest.raises(ValueError, match="no parameters 'nope'"):
        recentred_decay(model, 1.0, names=["nope"])
    model[0].weight.requires_grad_(False)
    assert "0.weight" not in recentred_decay(model, 1.0).anchor
