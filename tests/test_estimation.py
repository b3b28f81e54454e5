"""``estimate`` and ``Estimator``: data in, curvature out, and the model as it was."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.exactness_helpers import block_errors, double, draw, relative
from torch import Tensor, nn

import kronfac as kf
from kronfac.estimator import Estimator
from kronfac.sources import Sampled
from kronfac.tape import record


def small() -> nn.Module:
    return double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))


LABELS = torch.arange(12) % 3


def pairs(sizes: tuple[int, ...] = (5, 4, 3)) -> list[tuple[Tensor, Tensor]]:
    return list(zip(draw(12, 3).split(sizes), LABELS.split(sizes), strict=True))


# ---------------------------------------------------------------------------------------------------- data
class Two(nn.Module):
    """Two arguments in, two out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = small()

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layers(x + shift), "other": x}


def test_every_form_of_data_is_the_same_curvature() -> None:
    model, x = small(), draw(12, 3)
    wanted = kf.estimate(model, kf.Categorical(), (x, LABELS), source="exact").to_dense()

    def generate() -> Iterator[tuple[Tensor, Tensor]]:
        yield from pairs()

    dataset = torch.utils.data.TensorDataset(x, LABELS)
    loaders: list[Any] = [[x, LABELS], pairs(), tuple(pairs((4, 4, 4))), generate()]
    loaders += [torch.utils.data.DataLoader(dataset, batch_size=5)]
    for loader in loaders:
        found = kf.estimate(model, kf.Categorical(), loader, source="exact").to_dense()
        assert relative(found, wanted) < 1e-12


def test_several_arguments_and_outputs() -> None:
    model, x, shift = Two(), draw(12, 3), draw(12, 3, seed=1)
    wanted = kf.estimate(model.layers, kf.Categorical(), (x + shift, LABELS), source="exact").to_dense()
    for inputs in ((x, shift), [x, shift], {"x": x, "shift": shift}):
        found = kf.estimate(
            model, kf.Categorical(), [(inputs, LABELS)], source="exact", outputs=lambda out: out["logits"]
        )
        assert torch.equal(found.to_dense(), wanted)
        assert found.parameter_names[0] == "layers.0.weight"
    single = ({"x": x, "shift": shift}, LABELS)
    assert kf.estimate(model, kf.Categorical(), single, outputs=lambda out: out["logits"]).blocks
    with pytest.raises(TypeError, match=r"outputs are of type dict.*outputs=lambda out: out\.logits"):
        kf.estimate(model, kf.Categorical(), single)


def test_seeds_decide() -> None:
    model = small()
    found = [kf.estimate(model, kf.Categorical(), pairs(), samples=2, seed=seed).to_dense() for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_model_is_left_as_it_was() -> None:
    model = double(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)))
    model[1].eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    model[1].train()
    kf.estimate(model, kf.Categorical(), pairs())
    model[1].eval()
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_works_under_no_grad() -> None:
    model = small()
    wanted = kf.estimate(model, kf.Categorical(), pairs()).to_dense()
    with torch.no_grad():
        found = kf.estimate(model, kf.Categorical(), pairs()).to_dense()
        assert not torch.is_grad_enabled()
    assert torch.equal(found, wanted)


# ---------------------------------------------------------------------------------------------------- progress
def test_progress_with_rich(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    wanted = kf.estimate(small(), kf.Categorical(), pairs()).to_dense()
    assert torch.equal(kf.estimate(small(), kf.Categorical(), pairs(), progress=True).to_dense(), wanted)
    assert "rich" in sys.modules


def test_progress_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original = builtins.__import__

    def without_rich(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("rich"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    kf.estimate(small(), kf.Categorical(), pairs(), progress=True)
    assert "curvature: batch 3 of 3" in capsys.readouterr().err
    kf.estimate(small(), kf.Categorical(), iter(pairs()), progress=True)
    assert "curvature: batch 3\n" in capsys.readouterr().err


def test_silence_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    kf.estimate(small(), kf.Categorical(), pairs())
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


# ---------------------------------------------------------------------------------------------------- coverage
class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.middle, self.decoder = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight
        self.scale = nn.Parameter(torch.ones(()))
        double(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.middle(self.encoder(x)).tanh()) * self.scale


def test_uncovered_parameters_are_named_once() -> None:
    with pytest.warns(kf.CoverageWarning) as caught:
        curvature = kf.estimate(Tied(), kf.Categorical(), pairs(), source="exact")
    assert len(caught) == 1
    text = str(caught[0].message)
    for name in ("encoder.weight", "encoder.bias", "decoder.bias", "scale", "tied", "Tied", "kronfac.coverage(model)"):
        assert name in text
    assert "middle" not in text
    assert curvature.parameter_names == ("middle.weight", "middle.bias")


@pytest.mark.filterwarnings("ignore::kronfac.CoverageWarning")
def test_covered_layers_beside_uncovered_ones_are_right() -> None:
    """One datum, so that KFAC is exact."""
    model, x, y = Tied(), draw(1, 3), LABELS[:1]
    curvature = kf.estimate(model, kf.Categorical(), (x, y), source="exact")
    assert max(block_errors(curvature, model, kf.reference.ggn(model, kf.Categorical(), x, y)).values()) < 1e-8


@pytest.mark.parametrize("which", ["weight", "bias", "layer"])
def test_frozen_parameters(which: str) -> None:
    model = small()
    for name, parameter in model[0].named_parameters():
        parameter.requires_grad_(which not in (name, "layer"))
    x, y = draw(1, 3), LABELS[:1]
    curvature = kf.estimate(model, kf.Categorical(), (x, y), source="exact")
    assert max(block_errors(curvature, model, kf.reference.ggn(model, kf.Categorical(), x, y)).values()) < 1e-8
    frozen = {"weight": {"0.weight"}, "bias": {"0.bias"}, "layer": {"0.weight", "0.bias"}}[which]
    assert set(curvature.parameter_names) == {name for name, _ in model.named_parameters()} - frozen


def test_subclasses_inherit_their_adapter() -> None:
    class Own(nn.Linear):
        pass

    model = double(nn.Sequential(Own(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    plain = double(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    found, wanted = (kf.estimate(m, kf.Categorical(), pairs()) for m in (model, plain))
    assert torch.equal(found.to_dense(), wanted.to_dense())


def test_a_model_without_any_supported_layer() -> None:
    with pytest.raises(ValueError, match=r"No layer.*weight.*Bilinear"):
        kf.estimate(nn.Bilinear(2, 2, 2), kf.Categorical(), ((draw(2, 2), draw(2, 2)), LABELS[:2]))


# ---------------------------------------------------------------------------------------------------- bad input
def poisoned(value: float) -> Tensor:
    x = draw(5, 3)
    x[1, 1] = value
    return x


def broken() -> nn.Module:
    model = small()
    with torch.no_grad():
        model[0].bias[0] = torch.nan
    return model


SMALL = small()
BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no data": (lambda: kf.estimate(SMALL, kf.Categorical(), []), ValueError, "loader is empty"),
    "no pairs": (lambda: kf.estimate(SMALL, kf.Categorical(), [draw(5, 3)]), TypeError, "pairs.*not Tensor"),
    "no iterable": (lambda: kf.estimate(SMALL, kf.Categorical(), 3), TypeError, "loader must be an iterable.*not int"),
    "seed": (lambda: kf.estimate(SMALL, kf.Categorical(), pairs(), seed="one"), TypeError, "seed='one'"),
    "samples": (lambda: kf.estimate(SMALL, kf.Categorical(), pairs(), samples=0), ValueError, "samples=0"),
    "loss module": (
        lambda: kf.estimate(SMALL, nn.CrossEntropyLoss(), pairs()),
        TypeError,
        r"not CrossEntropyLoss; kronfac\.likelihood_of",
    ),
    "model": (lambda: kf.estimate("net", kf.Categorical(), pairs()), TypeError, "torch.nn.Module, not str"),
    "range": (lambda: kf.estimate(SMALL, kf.Categorical(), (draw(5, 3), LABELS[:5] + 1)), ValueError, "0 to 2.*got 3"),
    "shape": (lambda: kf.estimate(SMALL, kf.Gaussian(), pairs()), ValueError, r"\(5,\).*\(5, 3\)"),
    "empty batch": (lambda: kf.estimate(SMALL, kf.Gaussian(), (draw(0, 3), None)), ValueError, "no element"),
    "nan": (
        lambda: kf.estimate(SMALL, kf.Categorical(), (poisoned(torch.nan), None)),
        FloatingPointError,
        "input of the first layer, '0'",
    ),
    "inf": (
        lambda: kf.estimate(SMALL, kf.Gaussian(), (poisoned(torch.inf), None)),
        FloatingPointError,
        "layer '0'|layer, '0'",
    ),
    "parameters": (
        lambda: kf.estimate(broken(), kf.Categorical(), (draw(5, 3), None)),
        FloatingPointError,
        "first appear in the input of layer '2', after layer '0'",
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_error(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


# ---------------------------------------------------------------------------------------------------- Estimator
def gather(estimator: Estimator, x: Tensor, y: Any = None) -> None:
    with record(estimator.adaptation.adapters) as tape:
        out = estimator.model(x)
    estimator.update(tape, out, y)


def test_running_statistics_forget_exponentially() -> None:
    model = small()
    estimator = Estimator(model, kf.Categorical(), source="exact")
    parts = []
    for x, y in pairs():
        estimator.decay(0.7)
        gather(estimator, x, y)
        parts.append(kf.estimate(model, kf.Categorical(), (x, y), source="exact").blocks)
    weights = torch.tensor([5 * 0.49, 4 * 0.7, 3.0], dtype=torch.float64)
    weights /= weights.sum()
    for name, block in estimator.curvature().blocks.items():
        for key, tensor in block.tensors().items():
            wanted = sum(w * part[name].tensors()[key] for w, part in zip(weights, parts, strict=True))
            torch.testing.assert_close(tensor, wanted, rtol=1e-12, atol=1e-14)


def test_curvature_before_any_data_names_the_layers() -> None:
    with pytest.raises(RuntimeError, match=r"No statistics for layers \['0', '2'\]"):
        Estimator(small(), kf.Categorical()).curvature()


def test_a_curvature_is_not_changed_by_later_statistics() -> None:
    estimator = Estimator(small(), kf.Categorical(), source="exact")
    gather(estimator, draw(5, 3))
    curvature = estimator.curvature()
    before = curvature.to_dense()
    gather(estimator, draw(5, 3, seed=1))
    assert torch.equal(curvature.to_dense(), before)
    assert not torch.equal(estimator.curvature().to_dense(), before)


def test_objects_and_options_reach_their_places() -> None:
    model = double(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)))
    estimator = Estimator(model, kf.Categorical(), source=Sampled(3), norm="full")
    assert estimator.source.count == 3
    gather(estimator, draw(5, 3))
    curvature = estimator.curvature()
    assert curvature.blocks["1"].shape == (4, 2)
    assert curvature.options == {"sharing": "expand", "norm": "full"}


@pytest.mark.parametrize("source", ["sampled", "exact", "empirical", "recursive"])
def test_batches_of_one_class_count_with_its_weight(source: str) -> None:
    """Weights that are uniform within a batch are not uniform over the data."""
    model = double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    likelihood = kf.Categorical(torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64))
    x, y = draw(7, 3), torch.tensor([0, 0, 1, 1, 1, 1, 2])
    whole = kf.estimate(model, likelihood, (x, y), source=source)
    parts = kf.estimate(
        model, likelihood, list(zip(x.split([2, 4, 1]), y.split([2, 4, 1]), strict=True)), source=source
    )
    for name, block in whole.blocks.items():
        torch.testing.assert_close(parts.blocks[name].tensors()["input"], block.tensors()["input"])
