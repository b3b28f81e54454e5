"""Which parameters of a model have a block, and the reason for each that has none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import kronfac as kf
from kronfac.layers import adapt, adapt_model
from kronfac.layers.linear import LinearAdapter
from kronfac.layers.norm import FullNormAdapter


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def test_every_trained_parameter_is_covered_or_has_a_reason() -> None:
    model = Attention()
    found = adapt_model(model)
    assert list(found.adapters) == ["head"]
    assert found.covered == ("head.weight", "head.bias")
    assert set(found.uncovered) == {
        "attention.in_proj_weight",
        "attention.in_proj_bias",
        "attention.out_proj.weight",
        "attention.out_proj.bias",
    }
    assert all("MultiheadAttention" in reason for reason in found.uncovered.values())
    assert found.order == tuple(name for name, _ in model.named_parameters())


def test_tied_weights_are_named_with_each_other() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(3, 3), "decoder": nn.Linear(3, 3), "last": nn.Linear(3, 1)})
    model["decoder"].weight = model["encoder"].weight
    found = adapt_model(model)
    assert list(found.adapters) == ["last"]
    assert "decoder.weight" in found.uncovered["encoder.weight"]
    assert "tied" in found.uncovered["decoder.bias"]
    assert set(found.order) == set(found.uncovered) | set(found.covered)


def test_a_module_under_two_names_is_one_layer() -> None:
    """It is refused later, if it is really called twice."""
    layer = nn.Linear(3, 3)
    found = adapt_model(nn.ModuleDict({"one": layer, "two": layer}))
    assert set(found.covered) | set(found.uncovered) == {"one.weight", "one.bias"}


def test_frozen_parameters_have_neither_block_nor_reason() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    model[1].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    found = adapt_model(model)
    assert found.frozen == ("0.weight", "0.bias", "1.weight", "2.bias")
    assert not found.uncovered
    assert found.adapters["1"].parameter_names == ("1.bias",)
    assert found.adapters["1"].d_in == 1
    assert found.adapters["2"].parameter_names == ("2.weight",)


def test_parameters_that_an_adapter_does_not_know_are_named() -> None:
    class Gated(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.gate = nn.Parameter(torch.zeros(2))

    found = adapt_model(nn.Sequential(Gated()))
    assert list(found.adapters) == ["0"]
    assert list(found.uncovered) == ["0.gate"]
    assert "Gated" in found.uncovered["0.gate"]


def test_layers_with_a_forward_of_their_own_have_no_block_until_they_are_registered() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    patched = nn.Linear(2, 2)
    patched.forward = lambda x: F.linear(x, 2 * patched.weight)  # type: ignore[method-assign]
    model = nn.Sequential(nn.Linear(2, 2), Doubled(2, 2), patched)
    found = adapt_model(model)
    assert list(found.adapters) == ["0"]
    assert set(found.uncovered) == {"1.weight", "1.bias", "2.weight", "2.bias"}
    assert "Doubled has a forward of its own, so that Linear's formulas" in found.uncovered["1.weight"]
    adapt.register(Doubled, adapt.dispatch(nn.Linear))
    assert list(adapt_model(model).adapters) == ["0", "1"]


def test_a_convolution_whose_inner_forward_is_its_own_has_no_block() -> None:
    """As weight-standardised and equalised convolutions are often written."""

    class Scaled(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, 2 * weight, bias)

    class Normalised(nn.InstanceNorm1d):
        def _apply_instance_norm(self, input: Tensor) -> Tensor:
            return super()._apply_instance_norm(input).relu()

    class Plain(nn.Conv2d):
        pass

    found = adapt_model(nn.Sequential(Scaled(1, 2, 2), Normalised(2, affine=True), Plain(1, 2, 2)))
    assert list(found.adapters) == ["2"]
    assert "Scaled has a forward of its own, so that Conv2d's formulas" in found.uncovered["0.weight"]
    assert "Normalised has a forward of its own" in found.uncovered["1.weight"]


def test_parameters_of_a_container_are_named() -> None:
    class Positioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.zeros(3))
            self.layer = nn.Linear(3, 1)

    found = adapt_model(Positioned())
    assert list(found.uncovered) == ["position"]
    assert "Positioned" in found.uncovered["position"]


def test_lazy_modules_are_refused_until_they_have_a_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"0\.weight, 0\.bias have no shape yet"):
        adapt_model(model)
    model(torch.zeros(2, 5))
    assert list(adapt_model(model).adapters) == ["0", "1"]


def test_a_layer_alone_is_a_model() -> None:
    assert adapt_model(nn.Linear(2, 1)).adapters[""].parameter_names == ("weight", "bias")


def test_sharing_and_norm_reach_the_adapters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Embedding(3, 2))
    found = adapt_model(model, sharing="reduce", norm="full")
    assert found.adapters["0"].sharing == "reduce"
    assert isinstance(found.adapters["1"], FullNormAdapter)
    assert "reduce" in found.uncovered["2.weight"]
    assert adapt_model(model).adapters["1"].stack == (2,)


def test_a_new_layer_type_is_one_registration() -> None:
    class Transparent(nn.Module):
        """y = W x under another name."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 2))
            self.in_features, self.out_features = 2, 3

    assert "Transparent" in adapt_model(nn.Sequential(Transparent(), nn.Linear(2, 2))).uncovered["0.weight"]

    adapt.register(Transparent, LinearAdapter)
    assert adapt_model(nn.Sequential(Transparent())).adapters["0"].shape == (3, 2)


@pytest.mark.parametrize(
    ("model", "options", "error", "text"),
    [
        (nn.Linear(2, 2), {"sharing": "both"}, ValueError, "sharing='both'"),
        (nn.Linear(2, 2), {"norm": "none"}, ValueError, "norm='none'"),
        (nn.Linear(2, 2).requires_grad_(False), {}, ValueError, "no trainable parameter"),
        (nn.ReLU(), {}, ValueError, "no trainable parameter"),
        ("model", {}, TypeError, "model must be a torch.nn.Module, not str"),
    ],
)
def test_bad_arguments_are_named(model: nn.Module, options: dict[str, str], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        adapt_model(model, **options)


class Spectral(nn.Module):
    """Complex numbers inside, real ones outside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5, dtype=torch.complex64), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.to(torch.complex64)).abs())


def test_layers_of_complex_numbers_are_named() -> None:
    model, x, y = Spectral(), torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    found = adapt_model(model)
    assert list(found.adapters) == ["last"]
    assert set(found.uncovered) == {"first.weight", "first.bias"}
    assert all("complex" in reason for reason in found.uncovered.values())
    with pytest.warns(kf.CoverageWarning, match="complex"):
        assert list(kf.estimate(model, kf.Categorical(), (x, y)).blocks) == ["last"]
    with pytest.warns(kf.CoverageWarning, match="complex"):
        optimizer = kf.optim.KFAC(model, kf.Categorical(), lr=0.1, stats_every=1, kl_clip=None)
    before = [p.detach().clone() for p in model.parameters()]
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_parametrisation_that_changes_nothing_for_now_is_one() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    found = adapt_model(model)
    assert found.covered == ("0.bias", "1.weight", "1.bias")
    assert set(found.uncovered) == {"0.parametrizations.weight.original"}
    x, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2
    with pytest.warns(kf.CoverageWarning, match="ParametrizationList"):
        assert kf.estimate(model, kf.Categorical(), (x, y)).parameter_names == found.covered


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_of_no_features_are_named() -> None:
    found = adapt_model(nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3), nn.Linear(3, 2)))
    assert list(found.adapters) == ["2"]
    assert all("without entries" in found.uncovered[name] for name in ("0.weight", "0.bias", "1.weight", "1.bias"))
