"""Penalties, statistics and the plugin where a dtype, an order or a batch is not the usual one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import kronfac as kf
from kronfac.continual import (
    AvalanchePlugin,
    QuadraticPenalty,
    TaskStatistics,
    load,
    merge_batchnorm,
    recentred_decay,
    save,
)


class InOrder(nn.Module):
    """Two layers of one shape, whose order of registration is given."""

    def __init__(self, names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = torch.tanh(self.get_submodule("a")(x))
        outputs: Tensor = self.get_submodule("b")(hidden)
        return outputs


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(64, 6), torch.randint(0, 3, (64,))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def strategy(model: nn.Module, data: tuple[Tensor, Tensor], size: int) -> SimpleNamespace:
    """What the plugin sees of a strategy of Avalanche."""
    dataset = list(zip(*data, strict=True))
    return SimpleNamespace(model=model, train_mb_size=size, experience=SimpleNamespace(dataset=dataset))


def test_anchors_stay_with_their_layers_where_the_order_of_layers_changed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second, live = InOrder("ab"), InOrder("ba"), InOrder("ab")
    batch = torch.randn(20, 4), torch.randint(0, 4, (20,))
    old, new = (kf.estimate(model, kf.Categorical(), batch) for model in (first, second))
    penalty = QuadraticPenalty(old).update(new)
    save(penalty, tmp_path / "p.safetensors")
    loaded = load(tmp_path / "p.safetensors", second)
    assert isinstance(loaded, QuadraticPenalty)
    torch.testing.assert_close(loaded.anchor, penalty.anchor, rtol=0, atol=0)
    assert float(loaded(second).detach()) == 0.0
    torch.testing.assert_close(loaded(live), penalty(live))


@pytest.mark.parametrize(("approximation", "combine"), [("kfac", "exact"), ("kfac", "nearest"), ("diagonal", "exact")])
def test_a_curvature_of_another_dtype_is_refused_and_fits_after_conversion(
    data: tuple[Tensor, Tensor], approximation: str, combine: str
) -> None:
    model, (x, y) = network().eval(), data
    penalty = QuadraticPenalty(kf.estimate(model, kf.Categorical(), (x, y), approximation=approximation))
    model.double()
    curvature = kf.estimate(model, kf.Categorical(), (x.double(), y), approximation=approximation)
    with pytest.raises(ValueError, match=r"torch\.float32 and torch\.float64: .*penalty\.to\(dtype=torch\.float64\)"):
        penalty.update(curvature, combine=combine)
    updated = penalty.to(dtype=torch.float64).update(curvature, combine=combine)
    assert updated(model).dtype == torch.float64


def test_a_coupled_curvature_of_another_dtype_is_refused_without_a_way_that_does_not_exist() -> None:
    model, y = nn.Sequential(nn.Linear(6, 3)), torch.tensor([0, 1, 2])
    x = torch.randn(3, 6)
    penalty = QuadraticPenalty(kf.estimate(model, kf.Categorical(), (x, y), approximation="kkfac"))
    model.double()
    curvature = kf.estimate(model, kf.Categorical(), (x.double(), y), approximation="kkfac")
    with pytest.raises(ValueError, match=r"torch\.float32 and torch\.float64: estimate the second on a model in torch"):
        penalty.update(curvature)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("from_file", [False, True])
def test_task_statistics_follow_the_models_dtype(
    data: tuple[Tensor, Tensor], dtype: torch.dtype, rtol: float, from_file: bool, tmp_path: Path
) -> None:
    model, (x, _) = network(), data
    statistics = TaskStatistics(model)
    statistics.remember("A", [x])
    model.to(dtype)
    if from_file:
        statistics.save(tmp_path / "s.safetensors")
        statistics = TaskStatistics(model)
        statistics.load(tmp_path / "s.safetensors")
    mean, variance = statistics.statistics("A")["1"]
    assert mean.dtype == variance.dtype == dtype
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    outputs = x.double() @ layer.weight.detach().double().T + layer.bias.detach().double()
    torch.testing.assert_close(mean.double(), outputs.mean(0), rtol=rtol, atol=1e-2 * rtol)
    torch.testing.assert_close(variance.double(), outputs.var(0), rtol=rtol, atol=0)
    with statistics.using("A"):
        assert model.eval()(x.to(dtype)).dtype == dtype


def test_task_statistics_are_as_precise_under_autocast(data: tuple[Tensor, Tensor]) -> None:
    statistics = TaskStatistics(network())
    statistics.remember("A", [data[0]])
    expected = statistics.statistics("A")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(statistics.statistics("A"), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_task_statistics_follow_the_model_to_another_device(data: tuple[Tensor, Tensor]) -> None:
    model = network()
    statistics = TaskStatistics(model)
    statistics.remember("A", [data[0]])
    before = statistics.statistics("A")["1"]
    model.cuda()
    after = statistics.statistics("A")["1"]
    assert all(tensor.is_cuda for tensor in after)
    torch.testing.assert_close(tuple(tensor.cpu() for tensor in after), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("read_under_autocast", [False, True])
def test_tracked_statistics_of_a_forward_under_autocast_have_the_weights_precision(
    data: tuple[Tensor, Tensor], read_under_autocast: bool
) -> None:
    model, (x, y) = network(), data
    merged = merge_batchnorm(model)
    penalty = QuadraticPenalty(kf.estimate(merged.folded(), kf.Categorical(), (x, y)))
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    with merged.tracked() as statistics:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=read_under_autocast):
            mean, variance = statistics["1"]
            value = penalty(merged.parameters(statistics))
        expected = layer.weight @ x.mean(0) + layer.bias
        torch.testing.assert_close(mean, expected)
        assert variance.dtype == torch.float32
        (nn.functional.cross_entropy(outputs.float(), y) + value).backward()
    assert layer.weight.grad is not None
    assert bool(layer.weight.grad.isfinite().all())


def test_the_plugin_takes_batches_of_one_where_examples_are_independent(data: tuple[Tensor, Tensor]) -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    found = []
    for size in (1, 63):  # 63 leaves a batch of one over
        plugin = AvalanchePlugin(kf.Categorical(), approximation="kfac", batch_size=size)
        plugin.after_training_exp(strategy(model, data, 10))
        assert isinstance(plugin.penalty, QuadraticPenalty)
        block = plugin.penalty.parts[0][1].blocks["0"]
        assert isinstance(block, kf.blocks.Kronecker)
        found.append(block.input)
    ones = torch.cat([data[0], torch.ones(64, 1)], 1)
    for factor in found:
        torch.testing.assert_close(factor, ones.T @ ones / 64)


def test_the_plugin_skips_a_batch_of_one_for_batch_norm_in_train_mode_alone(data: tuple[Tensor, Tensor]) -> None:
    model = network()
    plugin = AvalanchePlugin(kf.Categorical())
    assert [len(y) for _, y in plugin._batches(strategy(model.train(), data, 9), 0)] == [9] * 7
    assert [len(y) for _, y in plugin._batches(strategy(model.eval(), data, 9), 0)] == [*[9] * 7, 1]
    # Nothing would be left where all have one: some batch norms can, and torch names those that cannot.
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        plugin.after_training_exp(strategy(model.train(), data, 1))
    maps = nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(18, 3)
    )
    plugin.after_training_exp(strategy(maps.train(), data, 1))
    assert plugin.penalty is not None


def test_the_plugin_refuses_an_unknown_approximation() -> None:
    with pytest.raises(ValueError, match="approximation='kfca' is unknown"):
        AvalanchePlugin(kf.Categorical(), approximation="kfca")


@pytest.mark.parametrize("approximation", sorted(kf.approximations.APPROXIMATIONS))
@pytest.mark.parametrize("combine", ["exact", "factors", "nearest"])
def test_the_plugin_refuses_at_once_what_it_could_not_combine_later(
    data: tuple[Tensor, Tensor], approximation: str, combine: str
) -> None:
    state = torch.get_rng_state()
    refused = combine != "exact" and approximation in {"ekfac", "tekfac", "kkfac", "kfac_tridiagonal"}
    if refused or (combine, approximation) == ("factors", "tkfac"):
        with pytest.raises(ValueError, match=f"approximation='{approximation}' cannot be used online with combine="):
            AvalanchePlugin(kf.Categorical(), approximation=approximation, combine=combine)
        plugin = AvalanchePlugin(kf.Categorical(), approximation=approximation, combine=combine, online=False)
    else:
        plugin = AvalanchePlugin(kf.Categorical(), approximation=approximation, combine=combine)
    assert torch.equal(torch.get_rng_state(), state)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    for _ in range(3):
        plugin.after_training_exp(strategy(model, data, 16))
    assert plugin.penalty is not None
    assert float(plugin.penalty(model).detach()) == 0.0


def test_the_nearest_product_takes_a_further_scaled_one(data: tuple[Tensor, Tensor]) -> None:
    model = nn.Sequential(nn.Linear(6, 3)).double()
    new = kf.estimate(model, kf.Categorical(), (data[0].double(), data[1]), approximation="tkfac")
    penalty = QuadraticPenalty(new)
    for _ in range(2):  # the second meets the plain product that the first made
        penalty = penalty.update(new, decay=1.0, combine="nearest")
    torch.testing.assert_close(penalty.parts[0][1].to_dense(), 3 * new.to_dense())


@pytest.mark.parametrize("approximation", ["kfac", "xkfac", "kkfac"])
def test_a_saved_penalty_holds_layers_that_were_frozen_since(
    approximation: str, data: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    """Heads of earlier tasks are, since curvature of a later task asks for it."""
    torch.manual_seed(0)
    model = network()
    model[0].bias.requires_grad_(False)
    penalty = QuadraticPenalty(kf.estimate(model, kf.Categorical(), data, approximation=approximation))
    save(penalty, tmp_path / "p.safetensors")
    model.requires_grad_(True)
    model[3].requires_grad_(False)
    frozen = {name: not p.requires_grad for name, p in model.named_parameters()}
    loaded = load(tmp_path / "p.safetensors", model)
    assert {name: not p.requires_grad for name, p in model.named_parameters()} == frozen
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert torch.equal(loaded(model), penalty(model))
    assert loaded.parameter_names == penalty.parameter_names  # type: ignore[attr-defined]
    with pytest.raises(kf.StorageError, match="'3'"):
        load(tmp_path / "p.safetensors", nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()))


def test_penalties_take_compiled_and_wrapped_models_as_estimates_do(
    data: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    model = network()
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        penalty = QuadraticPenalty(kf.estimate(wrapped, kf.Categorical(), data), wrapped)
        decay = recentred_decay(wrapped, 1.0)
        save(penalty + decay, tmp_path / "p.safetensors")
        with torch.no_grad():
            model[0].weight.add_(0.1)
        for one in (penalty, decay, load(tmp_path / "p.safetensors", wrapped)):
            assert torch.equal(one(wrapped), one(model))
            assert float(one(wrapped).detach()) > 0


def test_changing_an_anchor_that_was_read_changes_no_penalty(data: tuple[Tensor, Tensor]) -> None:
    model = network()
    penalty = QuadraticPenalty(kf.estimate(model, kf.Categorical(), data))
    for tensor in penalty.anchor.values():
        tensor.add_(1.0)
    assert float(penalty(model).detach()) == 0.0


def test_decay_of_complex_parameters_is_their_squared_distance() -> None:
    start = {"a": torch.randn(3, dtype=torch.complex128, requires_grad=True), "b": torch.randn(2, dtype=torch.float64)}
    decay = recentred_decay(start, 3.0, names=start)
    live = {"a": (start["a"].detach() + (1 + 2j)).requires_grad_(), "b": start["b"] + 1}
    value = decay(live)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value.item(), 1.5 * (3 * 5 + 2))
    (gradient,) = torch.autograd.grad(value, live["a"])
    torch.testing.assert_close(gradient, torch.full_like(gradient, 3 + 6j))
    assert decay.to(dtype=torch.float32).anchor["a"].dtype == torch.complex64
    torch.testing.assert_close(decay.to(dtype=torch.float32)(live).item(), 25.5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"examples": 2.5}, TypeError, "examples must be an integer, got 2.5"),
        ({"batch_size": "8"}, TypeError, "batch_size must be an integer, got '8'"),
        ({"seed": None}, TypeError, "seed must be an integer, got None"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"approximation": kf.approximations.KFAC()}, TypeError, "approximation must be a name"),
    ],
)
def test_the_plugin_refuses_at_once_what_would_fail_after_an_experience(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        AvalanchePlugin(kf.Categorical(), **arguments)  # type: ignore[arg-type]
