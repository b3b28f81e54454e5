"""Merging keeps the function, and penalties act on merged weights."""

from __future__ import annotations

import pytest
import torch
from tests.approximations import xkfac_cases
from tests.continual.batchnorm_cases import CASES, Branching, Residual, unsettled
from torch import Tensor, nn

import kronfac as kf
from kronfac.continual import QuadraticPenalty, TaskStatistics, merge_batchnorm


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    make, shape = CASES[request.param]
    torch.manual_seed(0)
    return unsettled(make()), torch.randn(shape, dtype=torch.float64)


def test_the_folded_model_is_the_same_function(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    merged = merge_batchnorm(model)
    folded = merged.folded()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    merged.check(x, 1e-12)
    live = merged.parameters()
    assert list(live) == [name for name, _ in folded.named_parameters()]
    for name, parameter in folded.named_parameters():
        assert torch.equal(live[name].detach(), parameter)


def test_new_statistics_do_not_change_the_function(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    merged = merge_batchnorm(model)
    before, weights = model(x), {n: t.detach().clone() for n, t in merged.parameters().items()}
    new = {
        name: (torch.randn_like(mean), torch.rand_like(variance) + 0.1)
        for name, (mean, variance) in merged.statistics().items()
    }
    merged.reparameterise(new)
    for name, (mean, variance) in merged.statistics().items():
        assert torch.equal(mean, new[name][0])
        assert torch.equal(variance, new[name][1])
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    for name, tensor in merged.parameters().items():
        torch.testing.assert_close(tensor.detach(), weights[name], rtol=1e-12, atol=1e-12)


def test_statistics_of_new_data_are_taken_without_changing_the_function(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    merged = merge_batchnorm(model)
    first = next(iter(merged.pairs.values()))
    momentum, before = first.norm.momentum, model(x)
    batches = [x * 2, x[:3] + 1]
    with torch.no_grad():
        outputs = torch.cat([first.layer(batch).transpose(0, 1).flatten(1) for batch in batches], 1)
    merged.restandardise(batches)
    assert not model.training
    assert first.norm.momentum == momentum
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    if not isinstance(model, Branching):
        mean, variance = merged.statistics()[first.norm_name]
        torch.testing.assert_close(mean, outputs.mean(1))
        torch.testing.assert_close(variance, outputs.var(1))
    with pytest.raises(ValueError, match="inputs is empty"):
        merged.restandardise([])


def test_the_function_in_train_mode_is_the_old_one_under_new_statistics(case: tuple[nn.Module, Tensor]) -> None:
    """Of all layers at once: behind the first, train mode itself would have shown other activations."""
    model, x = case
    merged, batch = merge_batchnorm(model), (2 * x + 1).repeat(200, *[1] * (x.ndim - 1))
    merged.restandardise([batch])
    before = model(batch)
    # But for the running variance, which is the unbiased one.
    torch.testing.assert_close(model.train()(batch), before, rtol=0, atol=3e-3 * float(before.detach().abs().max()))


def test_weights_merged_with_the_batch_are_those_of_the_function_in_train_mode(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    merged = merge_batchnorm(model.train())
    with merged.watched() as batch:
        outputs = model(x)
        assert set(batch) == {pair.norm_name for pair in merged.pairs.values()}
        live = merged.parameters(batch)
        folded = torch.func.functional_call(merged.folded(), live, (x,))
        torch.testing.assert_close(folded, outputs, rtol=1e-10, atol=1e-10)
        # A layer's scale is divided out: along its own weights the merged ones do not change, but for eps.
        pair = next(iter(merged.pairs.values()))
        weight = pair.layer.weight
        (gradient,) = torch.autograd.grad(live[f"{pair.layer_name}.weight"].square().sum(), weight)
        along = (gradient * weight).flatten(1).sum(1).abs()
        assert bool((along < 1e-3 * gradient.flatten(1).norm(dim=1) * weight.flatten(1).norm(dim=1)).all())
        model.eval()(x)
        assert not batch
    model.train()(x)
    assert not batch


def test_tracked_statistics_are_means_over_batches_at_the_present_weights(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    merged = merge_batchnorm(model.train())
    pair = next(iter(merged.pairs.values()))
    inputs: list[Tensor] = []
    pair.layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach()))
    with merged.tracked(momentum=0.3) as found:
        for batch in (x, 2 * x + 1, -x):
            model(batch)
        model.eval()(100 * x)
        model.train()(3 * x)
        with torch.no_grad():
            pair.layer.weight.add_(0.5)
            means = [pair.layer.forward(given).transpose(0, 1).flatten(1).mean(1) for given in inputs]
        mean, variance = found[pair.norm_name]
        # Shares of 1, 1/2 and 1/3 make a plain average; the last batch has the momentum, that in eval mode no share.
        torch.testing.assert_close(mean, 0.7 * sum(means[:3]) / 3 + 0.3 * means[4])
        assert torch.equal(variance, pair.norm.running_var)
        assert mean.requires_grad
    assert not found


def test_tracked_variances_have_the_derivatives_of_the_batchs(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    merged = merge_batchnorm(model.train())
    weights = [pair.layer.weight for pair in merged.pairs.values()]
    gradients = []
    for statistics in (merged.watched(), merged.tracked()):
        with statistics as found:
            model(x)
            total = sum(variance.sum() for _, variance in found.values())
            gradients.append(torch.autograd.grad(total, weights))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_tracked_refuses_what_it_cannot_average() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    merged = merge_batchnorm(model)
    for momentum in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"momentum must be in \(0, 1\]"), merged.tracked(momentum):
            pass
    with merged.tracked():
        model(torch.zeros(4, 1, 8, 8))
        with pytest.raises(ValueError, match="inputs of '0' changed from"):
            model(torch.zeros(4, 1, 9, 9))


@pytest.mark.parametrize("layer", [0, 3, 5, 8])
def test_the_coupled_copy_gathers_what_belongs_to_merged_weights(layer: int) -> None:
    """Moments of the derivatives in what comes out of a layer's batch norm, through all that lies behind it."""
    model, x = xkfac_cases.perceptron(), xkfac_cases.inputs(8)
    merged = merge_batchnorm(model)
    coupled = merged.coupled()
    torch.testing.assert_close(coupled(x), model.train()(x), rtol=1e-10, atol=1e-10)
    assert [n for n, _ in coupled.named_parameters()] == [n for n, _ in merged.folded().named_parameters()]
    source = xkfac_cases.OneByOne()
    block = kf.estimate(coupled, kf.Categorical(), (x, None), approximation="xkfac", source=source).blocks[str(layer)]
    rows, _ = xkfac_cases.activations(model, layer, x)
    layers = list(model)
    if str(layer) in merged.pairs:  # an identity behind batch norm, whose outputs are batch norm's
        layer_behind = nn.Linear(layers[layer].out_features, layers[layer].out_features, dtype=x.dtype)
        nn.init.eye_(layer_behind.weight)
        nn.init.zeros_(layer_behind.bias)
        layers.insert(layer + 2, layer_behind)
    behind = layer + 2 if str(layer) in merged.pairs else layer
    gradients = xkfac_cases.cross_gradients(nn.Sequential(*layers), kf.Categorical(), behind, x)
    if layer in (5, 8):  # no batch norm behind their own
        plain = kf.estimate(coupled, kf.Categorical(), (x, None), source=source).blocks[str(layer)]
        torch.testing.assert_close(block.to_dense(), plain.to_dense(), rtol=1e-12, atol=1e-14)
    else:
        wanted = xkfac_cases.equation_59(rows, gradients)
        torch.testing.assert_close(block.to_dense(), wanted, rtol=1e-9, atol=1e-12)
    assert block.to_dense().norm() > 0


def test_layers_with_a_forward_of_their_own_are_not_coupled() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    merged = merge_batchnorm(nn.Sequential(Doubled(3, 2), nn.BatchNorm1d(2)), {"0": "1"})
    with pytest.raises(ValueError, match="layer '0' is a Doubled, whose forward is its own"):
        merged.coupled()


def test_batch_norm_of_several_processes_is_not_coupled() -> None:
    """As XK-FAC refuses the model itself."""
    merged = merge_batchnorm(nn.Sequential(nn.Linear(3, 2), nn.SyncBatchNorm(2)))
    with pytest.raises(ValueError, match=r"'1' is an nn\.SyncBatchNorm"):
        merged.coupled()
    merged.check(torch.randn(4, 3))


def test_a_penalty_on_merged_weights() -> None:
    model = unsettled(Residual())
    merged = merge_batchnorm(model)
    pair = (torch.randn(6, 2, 5, 5, dtype=torch.float64), torch.randint(3, (6,)))
    curvature = kf.estimate(merged.folded(), kf.Categorical(), pair, source="exact")
    penalty = QuadraticPenalty(curvature)
    assert penalty(merged.parameters()).item() == 0
    anchor = {name: t.detach().clone() for name, t in merged.parameters().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    live = merged.parameters()
    delta = torch.cat([(live[n] - anchor[n]).flatten() for n in curvature.parameter_names])
    value = penalty(live)
    torch.testing.assert_close(value, 0.5 * delta @ curvature.to_dense() @ delta, rtol=1e-10, atol=0)
    value.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    # new statistics alone cost nothing
    merged.reparameterise({n: (m + 1, v * 2) for n, (m, v) in merged.statistics().items()})
    torch.testing.assert_close(penalty(merged.parameters()), value, rtol=1e-10, atol=0)


def test_explicit_pairs() -> None:
    model = unsettled(Residual())
    merged = merge_batchnorm(model, {"conv1": "bn1", "conv2": "bn2"})
    merged.check(torch.randn(3, 2, 5, 5, dtype=torch.float64), 1e-12)
    swapped = merge_batchnorm(model, {"conv1": "bn2", "conv2": "bn1"})
    with pytest.raises(ValueError, match="differs from the model in eval mode"):
        swapped.check(torch.randn(3, 2, 5, 5, dtype=torch.float64))


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return h + self.bn(h)


class Activating(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.std((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias)


class WithoutBias(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class Padding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


def scaled_forward() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    plain = model[1].forward
    model[1].forward = lambda x: 2 * plain(x)
    return model


def test_layers_whose_own_forward_follows_weight_and_bias_are_merged() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Padding(2, 3, 3, dilation=2, bias=False), nn.BatchNorm2d(3), nn.ReLU()).double()
    unsettled(model)
    state = torch.random.get_rng_state()
    merged = merge_batchnorm(model, {"0": "1"})
    assert torch.equal(torch.random.get_rng_state(), state)
    merged.check(torch.randn(4, 2, 6, 6, dtype=torch.float64), 1e-12)
    with pytest.raises(ValueError, match="Padding has a forward of its own"):
        TaskStatistics(model, {"0": "1"}).remember("A", [torch.randn(4, 2, 6, 6, dtype=torch.float64)])


@pytest.mark.parametrize(
    ("make", "pairs", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3), Activating(3)), {"0": "1"}, "Activating '1' has a forward of its own"),
        (lambda: nn.Sequential(nn.Linear(3, 3), Activating(3)), None, "Activating '1' has a forward of its own"),
        (scaled_forward, {"0": "1"}, "BatchNorm1d '1' has a forward of its own"),
        (
            lambda: nn.Sequential(Standardised(3, 3, 2), nn.BatchNorm2d(3)),
            {"0": "1"},
            "Standardised '0' has a forward of its own, and its outputs are not scaled and shifted",
        ),
        (lambda: nn.Sequential(WithoutBias(3, 3), nn.BatchNorm1d(3)), {"0": "1"}, "WithoutBias '0' has a forward"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), None, "no batch norm to merge"),
        (lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)), None, r"batch norms \['0'\]"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3)), None, r"batch norms \['2'\]"),
        (Reused, None, r"batch norms \['bn'\]"),
        (Residual, {"conv1": "bn1"}, r"batch norms \['bn2'\]"),
        (Residual, {"conv1": "bn1", "conv2": "bn3"}, r"\['bn3'\], which the model does not have"),
        (Residual, {"conv1": "bn1", "conv2": "bn2", "head": "bn2"}, "batch norm to two layers"),
        (
            lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)),
            None,
            "'1' keeps no running statistics",
        ),
        (
            lambda: nn.Sequential(nn.ConvTranspose1d(3, 3, 1), nn.BatchNorm1d(3)),
            {"0": "1"},
            "ConvTranspose1d and BatchNorm1d",
        ),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(3)), None, "4 outputs and 3 features"),
    ],
)
def test_what_cannot_be_merged_is_named(make, pairs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_batchnorm(make(), pairs)


def test_statistics_of_no_batch_norm_or_of_no_batch_are_refused() -> None:
    """Instead of merging with the running ones, as constants."""
    model = unsettled(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))).train()
    x, merged = torch.randn(6, 3, dtype=torch.float64), merge_batchnorm(model)
    pair = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"no merged batch norm '0'; there are \['1'\]"):
        merged.parameters({"0": pair})
    with pytest.raises(ValueError, match=r"statistics of '1' must have shape \(4,\)"):
        merged.parameters({"1": (pair[0][:1], pair[1])})
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    for context in (merged.watched, merged.tracked):
        with context() as statistics:
            for forward in (lambda _: None, compiled):
                forward(x)
                with pytest.raises(ValueError, match="no batch was seen at the batch norms"):
                    merged.parameters(statistics)
            model(x)
            merged.parameters(statistics)
            model.eval()(x)
            merged.parameters(statistics)
            model.train()


def test_a_compiled_model_is_merged_as_the_one_inside() -> None:
    model = unsettled(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    x = torch.randn(6, 3, dtype=torch.float64)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    merged, statistics = merge_batchnorm(compiled), TaskStatistics(compiled)
    assert list(merged.parameters()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    statistics.remember("A", [x])
    assert list(statistics.statistics("A")) == ["1"]
    merged.check(x, 1e-12)


def test_bad_statistics_change_nothing() -> None:
    model = unsettled(Residual())
    merged = merge_batchnorm(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    good = torch.ones(4, dtype=torch.float64)
    for statistics, message in [
        ({"bn1": (good, good), "bn9": (good, good)}, "no merged batch norm 'bn9'"),
        ({"bn1": (good, good), "bn2": (good, -good)}, "variance not negative"),
        ({"bn1": (good, good), "bn2": (good[:2], good)}, r"must have shape \(4,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            merged.reparameterise(statistics)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    plain = unsettled(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False)))
    view = merge_batchnorm(plain)
    view.check(torch.randn(5, 3, dtype=torch.float64), 1e-12)
    with pytest.raises(ValueError, match="affine=False"):
        view.reparameterise({"1": (good, good)})
