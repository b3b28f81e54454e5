"""Layers and batch norms that are used elsewhere, too, or not as one layer, are refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.continual.batchnorm_cases import unsettled
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import weight_norm as old_weight_norm

import kronfac as kf
from kronfac.continual import TaskStatistics, merge_batchnorm, recentred_decay


class Net(nn.Module):
    """A layer, its batch norm, a second layer, a head; subclasses use the first in another way, too."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.bn, self.l2, self.fc = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 3)

    def hidden(self, h: Tensor) -> Tensor:
        found: Tensor = self.l2(h)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.hidden(torch.tanh(self.bn(self.l(x))))))  # type: ignore[no-any-return]


class ReadWeight(Net):
    def hidden(self, h: Tensor) -> Tensor:
        return F.linear(h, self.l.weight)


class ReadStatistics(Net):
    def hidden(self, h: Tensor) -> Tensor:
        return h - self.bn.running_mean  # type: ignore[operator]


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.l2.weight = self.l.weight


class TiedScale(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.norm.weight = self.bn.weight

    def hidden(self, h: Tensor) -> Tensor:
        found: Tensor = self.norm(h)
        return found


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            ReadWeight,
            r"'l' and 'bn' cannot be merged: 'l\.weight' is used without calling 'l', as by a functional call",
        ),
        (ReadStatistics, r"'bn\.running_mean' is used without calling 'bn'"),
        (Tied, r"'l\.weight' is shared \(tied\) with 'l2'"),
        (TiedScale, r"'bn\.weight' is shared \(tied\) with 'norm'"),
    ],
)
@pytest.mark.parametrize("pairs", [None, {"l": "bn"}])
def test_tensors_that_the_model_uses_elsewhere_are_named(
    make: Callable[[], nn.Module], message: str, pairs: dict[str, str] | None
) -> None:
    with pytest.raises(ValueError, match=message):
        merge_batchnorm(make(), pairs)


class Asked(Net):
    """Reads the dtype and sizes of a weight, not its values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.l.weight.dtype).reshape(-1, self.l.weight.size(1)))


class BothMerged(Net):
    """Two layers with one weight and batch norms of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.l2.weight, self.bn2 = self.l.weight, nn.BatchNorm1d(4)

    def hidden(self, h: Tensor) -> Tensor:
        found: Tensor = self.bn2(self.l2(h))
        return found


class TwoNames(Net):
    """The layer and its batch norm are called by their second names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(self.l, self.bn)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.l2(torch.tanh(self.first(x)))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [Asked, BothMerged, TwoNames])
def test_other_uses_that_change_nothing_are_merged(make: Callable[[], nn.Module]) -> None:
    model, x = unsettled(make()), torch.randn(6, 4, dtype=torch.float64)
    merged = merge_batchnorm(model)
    merged.check(x, 1e-12)
    assert list(merged.parameters()) == [name for name, _ in merged.folded().named_parameters()]
    before = model(x)
    merged.restandardise([2 * x + 1])
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


class Untraceable(nn.Module):
    """The block's layer is called once more, which no graph shows."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
        self.fc = nn.Linear(4, 3)
        self.again = True

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.block(x if x.sum() > 0 else -x)
        return self.fc(h + self.block[0](x) if self.again else self.block(h))  # type: ignore[no-any-return]


def test_calls_are_counted_where_the_model_cannot_be_traced() -> None:
    model, x = unsettled(Untraceable()), torch.randn(6, 4, dtype=torch.float64)
    assert isinstance(model, Untraceable)
    merged, statistics = merge_batchnorm(model), TaskStatistics(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    message = (
        r"'block\.0' and 'block\.1' are no pair: a forward pass called the layer 2 times and the batch norm 1 times"
    )
    for call in (lambda: merged.restandardise([x]), lambda: statistics.remember("A", [x])):
        with pytest.raises(ValueError, match=message):
            call()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not statistics.tasks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.again = False  # both are called twice, as one
    merged.check(x, 1e-12)
    expected = model(x)
    merged.restandardise([x])
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------ positions
def over_positions() -> nn.Sequential:
    """Batch norm over 6 positions of a layer with 6 units."""
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2)).double()


def test_batch_norm_over_a_linear_layers_positions_is_refused_once_it_is_seen() -> None:
    model, x = over_positions(), torch.randn(8, 6, 3, dtype=torch.float64) + 1
    merged, statistics = merge_batchnorm(model), TaskStatistics(model)
    message = r"'0' and '1' are no pair: of the linear layer's output \[8, 6, 6\] .*channels, which are positions"
    for call in (lambda: statistics.remember("A", [x]), lambda: merged.restandardise([x])):
        with pytest.raises(ValueError, match=message):
            call()
    for context in (merged.watched(), merged.tracked()):
        with pytest.raises(ValueError, match=message), context:
            model(x)


class Tokens(nn.Module):
    """Batch norm over a linear layer's units at all positions: moved to dimension 1, so that pairs must be named."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.bn, self.fc = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.bn(self.l(x).mT).mT).mean(1))  # type: ignore[no-any-return]


def test_batch_norm_over_units_behind_a_transpose_is_one_layer_with_them() -> None:
    model, x = unsettled(Tokens()), torch.randn(8, 4, 3, dtype=torch.float64) + 1  # as many positions as units
    assert isinstance(model, Tokens)
    merged, statistics = merge_batchnorm(model, {"l": "bn"}), TaskStatistics(model, {"l": "bn"})
    merged.check(x, 1e-12)
    outputs = model.l(x).flatten(0, 1)
    statistics.remember("A", [x])
    torch.testing.assert_close(statistics.statistics("A")["bn"], (outputs.mean(0), outputs.var(0)), rtol=1e-11, atol=0)
    with merged.tracked() as found:
        model.train()(x)
        torch.testing.assert_close(found["bn"][0], outputs.mean(0), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------ messages
@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        old_weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 3),
    ],
    ids=["weight norm", "spectral norm", "old weight norm", "pruned"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_weights_that_are_computed_from_others_are_refused_by_name(change: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(change(nn.Linear(4, 4)), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    merged, statistics = merge_batchnorm(model), TaskStatistics(model)
    for call in (merged.folded, merged.coupled, lambda: statistics.remember("A", [torch.randn(8, 4)])):
        with pytest.raises(ValueError, match="the weight of layer '0' is computed from other parameters"):
            call()


def test_decay_of_tensors_without_gradients_says_so() -> None:
    model = nn.Linear(2, 2)
    copies = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r"none of the tensors requires a gradient.*names="):
        recentred_decay(copies, 0.1)
    assert set(recentred_decay(copies, 0.1, names=copies).anchor) == {"weight", "bias"}


def test_a_penalty_on_merged_weights_that_are_shared_takes_both() -> None:
    model, x = unsettled(BothMerged()), torch.randn(6, 4, dtype=torch.float64)
    merged = merge_batchnorm(model)
    curvature = kf.estimate(merged.folded(), kf.Categorical(), (x, torch.zeros(6, dtype=torch.long)))
    penalty = kf.continual.QuadraticPenalty(curvature)
    assert penalty(merged.parameters()).item() == 0.0
    with torch.no_grad():
        model.get_parameter("l.weight").add_(0.1)
    assert penalty(merged.parameters()).item() > 0.0


class TwoViews(nn.Module):
    """A layer and its batch norm on two views of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.views = 2

    def forward(self, x: Tensor) -> Tensor:
        return sum((self.bn(self.l(view * x)) for view in range(1, self.views + 1)), torch.zeros(()))


def test_a_batch_with_several_statistics_has_no_merged_weights() -> None:
    model, x = unsettled(TwoViews()).train(), torch.randn(6, 4, dtype=torch.float64)
    assert isinstance(model, TwoViews)
    merged = merge_batchnorm(model, {"l": "bn"})
    with merged.watched() as statistics:
        with pytest.raises(ValueError, match=r"called the batch norms \['bn'\] more than once"):
            model(x)
        model.views = 1
        for _ in range(2):
            model(x)
        assert list(merged.parameters(statistics)) == ["l.weight", "l.bias"]
        model.views = 2
        model.eval()(x)  # by one and the same function
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class OneOfTwo(nn.Module):
    """Layers and batch norms of two domains, of which one is called."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.bn = nn.ModuleList(), nn.ModuleList()
        for _ in range(2):
            self.l.append(nn.Linear(4, 4))
            self.bn.append(nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn[1](self.l[1](x))  # type: ignore[no-any-return]


def test_task_statistics_name_layers_that_no_input_comes_to() -> None:
    statistics = TaskStatistics(OneOfTwo(), {"l.0": "bn.0", "l.1": "bn.1"})
    with pytest.raises(ValueError, match=r"called \['l\.0'\] on none of the inputs"):
        statistics.remember("A", [torch.randn(6, 4)])
    assert not statistics.tasks
