"""`verify` gives the numbers of the dense oracle, and finds mistakes where they are."""

from __future__ import annotations

import builtins
import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from tests.exactness_helpers import block_errors, double, draw, positions
from torch import Tensor, nn

import kronfac as kf
from kronfac.inspect import LayerCheck, VerificationError, VerificationReport, comparison
from kronfac.inspect.seeds import SeedCheck
from kronfac.layers import LayerAdapter, adapt
from kronfac.layers.conv import ConvAdapter
from kronfac.layers.linear import LinearAdapter


def classes(count: int, many: int = 3) -> Tensor:
    return torch.arange(count) % many


def small() -> nn.Module:
    return double(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))


def mixed() -> nn.Module:
    return double(
        nn.Sequential(
            nn.Conv2d(4, 6, 3, groups=2, dilation=2, stride=2, padding=1),
            nn.GroupNorm(2, 6),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(24, 3),
        )
    )


MIXED = (draw(6, 4, 6, 6), classes(6))


# ------------------------------------------------------------------------------------------------ exact cases
def test_deep_linear_network_is_exact() -> None:
    model = double(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)))
    report = kf.verify(model, kf.Gaussian(), (draw(9, 6), draw(9, 3, seed=1)), source="exact")
    assert [row.layer for row in report.rows] == ["0", "1", "2"]
    for row in report.rows:
        assert row.error < 1e-8
        assert row.cosine == pytest.approx(1, abs=1e-8)
        assert row.scale == pytest.approx(1, abs=1e-8)
        assert row.input_factor == pytest.approx(1, abs=1e-8)
        assert row.output_factor == pytest.approx(1, abs=1e-8)
        assert row.trace_factor is None
        assert row.scale_sampling == row.error_sampling == 0
    assert report.seeds.ratio == pytest.approx(1, abs=1e-8)
    assert report.seeds.sampling == 0
    report.raise_if(scale=1e-8, cosine=1 - 1e-8, error=1e-8, trace=1e-8)


def test_one_datum_is_exact() -> None:
    model = double(nn.Sequential(nn.Conv2d(2, 4, 3, dilation=2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)))
    report = kf.verify(model, kf.Categorical(), (draw(1, 2, 5, 5), classes(1)), source="exact")
    report.raise_if(scale=1e-8, error=1e-8)


@pytest.mark.parametrize("approximation", ["dense", "diagonal"])
def test_dense_and_diagonal_blocks_are_exact(approximation: str) -> None:
    report = kf.verify(mixed(), kf.Categorical(), MIXED, approximation=approximation, source="exact")
    report.raise_if(scale=1e-8, error=1e-8)
    assert all(row.input_factor is None and row.output_factor is None for row in report.rows)
    assert all(row.trace_factor == pytest.approx(1, abs=1e-10) for row in report.rows)


@pytest.mark.parametrize("source", ["exact", "sampled"])
def test_traces_of_ekfac_are_right_for_the_very_cotangents(source: str) -> None:
    report = kf.verify(mixed(), kf.Categorical(), MIXED, approximation="ekfac", source=source)
    report.raise_if(scale=1e-8)
    assert [row.block for row in report.rows] == ["eigen_kronecker", "dense", "eigen_kronecker"]
    assert all(row.trace_factor == pytest.approx(1, abs=1e-10) for row in report.rows)
    assert all(row.input_factor is None and row.output_factor is None for row in report.rows)


def test_ekfac_is_closer_than_kfac() -> None:
    options: dict[str, Any] = {"source": "exact"}
    plain, found = (
        kf.verify(mixed(), kf.Categorical(), MIXED, approximation=name, **options) for name in ("kfac", "ekfac")
    )
    for row, other in zip(found.rows, plain.rows, strict=True):
        assert row.error <= other.error * (1 + 1e-12)
        assert row.scale == pytest.approx(1, abs=1e-10)
    assert found.rows[0].error < 0.95 * plain.rows[0].error


# ------------------------------------------------------------------------------------------------ against the oracle
def restricted(model: nn.Module, adapter: LayerAdapter, dense: Tensor, diagonal: bool) -> tuple[Tensor, Tensor]:
    """A layer's exact matrix, and what of it a block keeps."""
    places = positions(model, adapter).flatten()
    whole = dense[places][:, places]
    units = len(places) if diagonal else math.prod(adapter.stack)
    ones = torch.ones(len(places) // units, len(places) // units, dtype=whole.dtype)
    return whole, whole * torch.block_diag(*[ones] * units)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("approximation", ["kfac", "ekfac", "dense", "diagonal"])
def test_numbers_are_those_of_dense_matrices(approximation: str, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not direct:
        monkeypatch.setattr(comparison, "DIRECT", 0)
    model, likelihood = mixed(), kf.Categorical()
    report = kf.verify(model, likelihood, MIXED, approximation=approximation, seed=3)
    curvature = kf.estimate(model, likelihood, [MIXED], approximation=approximation, seed=3)
    dense = kf.reference.ggn(model, likelihood, *MIXED)
    for row in report.rows:
        adapter, c = curvature.layouts[row.layer], curvature.blocks[row.layer].to_dense()
        assert isinstance(adapter, LayerAdapter)
        whole, f = restricted(model, adapter, dense, approximation == "diagonal")
        assert row.parameters == len(c)
        assert row.cosine == pytest.approx(float((c * f).sum() / c.norm() / f.norm()), rel=1e-9)
        assert row.scale == pytest.approx(float(c.trace() / f.trace()), rel=1e-9)
        assert row.error == pytest.approx(float((c - f).norm() / f.norm()), rel=1e-6)
        assert row.left_out == pytest.approx(float(1 - f.norm() ** 2 / whole.norm() ** 2), abs=1e-9)


@pytest.mark.parametrize("approximation", ["kfac", "ekfac", "dense"])
def test_small_memory_groups_layers_and_changes_nothing(approximation: str) -> None:
    options: dict[str, Any] = {"approximation": approximation, "source": "exact"}
    whole = kf.verify(mixed(), kf.Categorical(), MIXED, **options)
    pieces = kf.verify(mixed(), kf.Categorical(), MIXED, memory_limit=18 * 120 * 50, **options)
    for left, right in zip(whole.rows, pieces.rows, strict=True):
        assert left.layer == right.layer
        assert left.cosine == pytest.approx(right.cosine, rel=1e-12)


def test_batch_norm_in_train_mode_is_compared_with_the_coupled_matrix() -> None:
    model = double(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    batch = (draw(6, 5), classes(6))
    report = kf.verify(model, kf.Categorical(), batch, approximation="dense", samples=3)
    curvature = kf.estimate(model, kf.Categorical(), [batch], approximation="dense", samples=3)
    errors = block_errors(curvature, model, kf.reference.ggn(model, kf.Categorical(), *batch))
    assert {row.layer: row.error for row in report.rows} == pytest.approx(errors)
    assert all(row.trace_factor is None for row in report.rows), "coupling is neglected"
    assert any("couples" in note for note in report.notes)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(parameter.grad is None for parameter in model.parameters())
    # K-FAC's factors are right all the same: each cotangent is pulled through the whole batch.
    factored = [row for row in kf.verify(model, kf.Categorical(), batch).rows if row.block == "kronecker"]
    assert [row.layer for row in factored] == ["0", "3"]
    for row in factored:
        assert row.input_factor == pytest.approx(1, abs=1e-10)
        assert row.output_factor == pytest.approx(1, abs=1e-10)


# ------------------------------------------------------------------------------------------------ factors
class Tokens(nn.Module):
    """Logits at every position, ``[B, T, classes]``."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=0)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        z = self.head(torch.tanh(self.mix(self.table(x))))
        return z.mean(1) if self.pooled else z.movedim(-1, 1)


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


IDS = torch.arange(15).reshape(5, 3) % 7
TOKENS = torch.tensor([[0, 1, -1], [2, -1, -1], [1, 1, 0], [2, 0, 1], [0, -1, 2]])


def transposed(**options: Any) -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(4, 4, 3, **options), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())


@pytest.mark.parametrize("source", ["sampled", "exact"])
@pytest.mark.parametrize(
    ("model", "likelihood", "batch", "options"),
    [
        (mixed(), kf.Categorical(), MIXED, {}),
        (mixed(), kf.Categorical(), MIXED, {"sharing": "reduce"}),
        (mixed(), kf.Categorical(weight=torch.tensor([1.0, 2.0, 0.5])), MIXED, {}),
        (frozen(mixed(), "0.weight", "4.bias"), kf.Categorical(), MIXED, {}),
        (double(transposed(stride=2, groups=2)), kf.Gaussian(), (draw(3, 4, 3, 3), draw(3, 16, seed=1)), {}),
        (double(transposed(padding=1)), kf.Gaussian(reduction="sum"), (draw(3, 4, 3, 3), draw(3, 16, seed=1)), {}),
        (double(Tokens()), kf.Categorical(ignore_index=-1, class_dim=1), (IDS, TOKENS), {}),
        (double(Tokens()), kf.Categorical(class_dim=1), (IDS, (TOKENS.abs(), TOKENS >= 0)), {}),
        (frozen(double(Tokens(True)), "table.weight"), kf.Categorical(), (IDS, classes(5)), {"sharing": "reduce"}),
        (double(nn.Sequential(nn.Conv1d(2, 3, 3, padding_mode="circular", padding=1), nn.Flatten(), nn.Linear(15, 2))),
         kf.Bernoulli(pos_weight=torch.tensor([2.0, 3.0])), (draw(4, 2, 5), (draw(4, 2) > 0).double()), {}),
    ],
    ids=["grouped", "reduce", "class-weights", "frozen", "transposed", "transposed-sum", "ignored", "masked", "pooled",
         "pos-weight"],
)  # fmt: skip
def test_right_factors_are_one_to_rounding(
    model: nn.Module, likelihood: kf.Likelihood, batch: tuple[Any, Any], options: dict[str, str], source: str
) -> None:
    report = kf.verify(model, likelihood, batch, source=source, **options)
    assert any(row.input_factor is not None for row in report.rows)
    for row in report.rows:
        known = [row.trace_factor] if row.input_factor is None else [row.input_factor, row.output_factor]
        assert known == pytest.approx([1] * len(known), abs=1e-10), row.layer
    assert abs(report.seeds.ratio - 1) < 1e-10 + 4 * report.seeds.sampling
    report.raise_if(scale=1e-8)
    for approximation in ("dense", "diagonal"):
        kf.verify(model, likelihood, batch, source=source, approximation=approximation, **options).raise_if(scale=1e-8)


# ------------------------------------------------------------------------------------------------ wrong adapters
class SummedLinear(nn.Linear):
    pass


@adapt.register
def _(module: SummedLinear, name: str, sharing: str = "expand") -> LayerAdapter:
    class Summed(LinearAdapter):
        """Divides by examples instead of rows: S times too large."""

        def add_input_gram_(self, total: Tensor, x: Tensor, *args: Any) -> float | Tensor:
            super().add_input_gram_(total, x, *args)
            return float(x.shape[0])

    return Summed(module, name, sharing)


class Undilated(nn.Conv2d):
    pass


@adapt.register
def _(module: Undilated, name: str, sharing: str = "expand") -> LayerAdapter:
    class Wrong(ConvAdapter):
        """Takes neighbours instead of every second place; as many rows as there are."""

        def __init__(self) -> None:
            super().__init__(module, name, sharing)
            self.geometry = replace(self.geometry, dilation=(1, 1))

        def _image(self, x: Tensor) -> Tensor:
            x = super()._image(x)
            return x[..., :-2, :-2] if x.shape[1] == module.in_channels else x

    return Wrong()


class Halved(nn.Linear):
    pass


@adapt.register
def _(module: Halved, name: str, sharing: str = "expand") -> LayerAdapter:
    class Half(LinearAdapter):
        def expand_cotangents(self, g: Tensor) -> Tensor:
            return super().expand_cotangents(g) * 0.5

    return Half(module, name, sharing)


class Shuffled(nn.Linear):
    pass


@adapt.register
def _(module: Shuffled, name: str, sharing: str = "expand") -> LayerAdapter:
    class Turned(LinearAdapter):
        """Rows right, columns of the parameters' matrix in another order."""

        def _weight_to_matrix(self, weight: Tensor) -> Tensor:
            return weight.flip(-1)

        def _matrix_to_weight(self, columns: Tensor) -> Tensor:
            return columns.flip(-1)

    return Turned(module, name, sharing)


class Lost(nn.Linear):
    pass


@adapt.register
def _(module: Lost, name: str, sharing: str = "expand") -> LayerAdapter:
    class Losing(LinearAdapter):
        def _matrix_to_weight(self, columns: Tensor) -> Tensor:
            return columns.flip(-1)

    return Losing(module, name, sharing)


def row_of(report: VerificationReport, layer: str) -> LayerCheck:
    return next(row for row in report.rows if row.layer == layer)


@pytest.mark.parametrize("source", ["sampled", "exact"])
def test_a_factor_off_by_the_number_of_positions_is_found(source: str) -> None:
    model = double(nn.Sequential(SummedLinear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(30, 3)))
    report = kf.verify(model, kf.Categorical(), (draw(5, 6, 4), classes(5)), source=source)
    assert row_of(report, "0").input_factor == pytest.approx(6)
    with pytest.raises(VerificationError, match=r"(?s)1 of 2 layers.*  0: input factor 6 times") as caught:
        report.raise_if(scale=0.01)
    assert "  3:" not in str(caught.value), "the layer that is right is not named"


@pytest.mark.parametrize("source", ["sampled", "exact"])
def test_a_dilation_that_is_not_read_is_found(source: str) -> None:
    model = double(nn.Sequential(Undilated(2, 3, 3, dilation=2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)))
    report = kf.verify(model, kf.Categorical(), (draw(5, 2, 7, 7), classes(5)), source=source)
    with pytest.raises(VerificationError, match=r"1 of 2 layers .*\n  0: input factor"):
        report.raise_if(scale=0.01)


def test_an_output_factor_off_by_a_factor_is_found() -> None:
    model = double(nn.Sequential(Halved(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    batch = (draw(8, 4), classes(8))
    for source in ("exact", "sampled"):
        with pytest.raises(VerificationError, match=r"1 of 2 layers .*\n  0: .*output factor 0.25 times"):
            kf.verify(model, kf.Categorical(), batch, source=source).raise_if(scale=0.01)
        with pytest.raises(VerificationError, match=r"1 of 2 layers .*\n  0: tr C 0.25 times"):
            kf.verify(model, kf.Categorical(), batch, approximation="dense", source=source).raise_if(scale=0.01)


def test_parameters_in_another_order_are_found() -> None:
    model = double(nn.Sequential(Shuffled(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    report = kf.verify(model, kf.Categorical(), (draw(8, 4), classes(8)), source="exact")
    with pytest.raises(VerificationError, match=r"1 of 2 layers .*\n  0: input factor"):
        report.raise_if(scale=0.01)


def test_a_layout_that_loses_parameters_is_found() -> None:
    model = double(nn.Sequential(Lost(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    with pytest.raises(VerificationError, match="unpack does not invert"):
        kf.verify(model, kf.Categorical(), (draw(8, 4), classes(8)), approximation="dense", source="exact")


class Doubled(kf.Categorical):
    """Its samples do not belong to its loss."""

    def sample_cotangents(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2**0.5 * super().sample_cotangents(*args, **kwargs)

    def root_columns(self, *args: Any, **kwargs: Any) -> Any:
        return (2**0.5 * column for column in super().root_columns(*args, **kwargs))


@pytest.mark.parametrize("source", ["sampled", "exact"])
def test_a_likelihood_whose_samples_contradict_its_loss_is_found(source: str) -> None:
    report = kf.verify(small(), Doubled(), (draw(20, 5), classes(20)), source=source)
    assert report.seeds.ratio == pytest.approx(2, abs=0.2)
    with pytest.raises(VerificationError, match=r"0 of 2 layers .*\n  cotangents of the outputs: \|v\|² 2"):
        report.raise_if(scale=0.01)
    report.raise_if(cosine=0.0)  # asks another question


def test_a_confident_model_is_not_accused_of_its_rare_labels() -> None:
    model = double(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([12.0, 0.0, 0.0]))
    report = kf.verify(model, kf.Categorical(), (draw(4, 5), classes(4)))
    assert report.seeds.ratio < 0.5, "no draw holds a rare label"
    report.raise_if(scale=0.01)


class Nameless(kf.Categorical):
    def label_atoms(self, outputs: Tensor) -> Any:
        raise NotImplementedError


def test_labels_need_not_be_enumerable() -> None:
    report = kf.verify(small(), Nameless(), (draw(20, 5), classes(20)))
    assert 0 < report.seeds.sampling < 0.01
    report.raise_if(scale=0.01)


class Positions(nn.Module):
    """Embeddings of positions scale all examples, so that cotangents of examples add up in them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.place, self.head = nn.Embedding(9, 4), nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(x) * self.place(torch.arange(x.shape[1])))).mean(1)


def test_examples_mixed_by_a_layer_are_found() -> None:
    batch = (torch.arange(30).reshape(6, 5) % 9, classes(6))
    report = kf.verify(double(Positions()), kf.Categorical(), batch)
    report.raise_if(scale=1e-8)  # sampled labels are independent, and K-FAC's factor right
    assert any("place" in note and "mixed" in note for note in report.notes)
    try:
        report = kf.verify(double(Positions()), kf.Categorical(), batch, source="exact")
    except ValueError:
        return  # refused: as good
    with pytest.raises(VerificationError, match=r"1 of 3 layers .*\n  place: output factor"):
        report.raise_if(scale=0.01)


# ------------------------------------------------------------------------------------------------ sampling error
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("approximation", ["dense", "kfac", "ekfac"])
def test_expected_sampling_error_is_the_one_seen(approximation: str, samples: int) -> None:
    # Small weights: labels about equally likely, so that a few draws tell how they vary.
    model, likelihood, batch = (
        double(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), scale=0.2),
        kf.Categorical(),
        (draw(4, 5), classes(4)),
    )
    options: dict[str, Any] = {"approximation": approximation}
    expected = kf.estimate(model, likelihood, [batch], source="exact", **options).blocks
    report = kf.verify(model, likelihood, batch, samples=samples, **options)
    dense = kf.reference.ggn(model, likelihood, *batch)
    parts = {"0": dense[:24, :24], "2": dense[24:, 24:]}
    seeds = range(100, 200)
    draws = [kf.estimate(model, likelihood, [batch], samples=samples, seed=seed, **options).blocks for seed in seeds]
    for row in report.rows:
        centre = expected[row.layer].to_dense()
        apart = torch.stack([(blocks[row.layer].to_dense() - centre).norm() for blocks in draws])
        seen = float(apart.square().mean().sqrt()) / float(parts[row.layer].norm())
        assert row.error_sampling == pytest.approx(seen, rel=0.35)
        traced = torch.stack([blocks[row.layer].trace() for blocks in draws]).std() / parts[row.layer].trace()
        assert row.scale_sampling == pytest.approx(float(traced), rel=0.6)


def test_right_models_pass_whatever_the_seed() -> None:
    for seed in range(10):
        report = kf.verify(mixed(), kf.Categorical(), MIXED, seed=seed)
        report.raise_if(scale=0.01)
        kf.verify(small(), kf.Categorical(), (draw(9, 5), classes(9)), approximation="dense", seed=seed).raise_if(
            scale=0.01, error=0.01, cosine=0.99, trace=0.01
        )


def test_a_root_probe_is_verified_as_such() -> None:
    source = kf.sources.Sampled(samples=4, probe="root")
    report = kf.verify(small(), kf.Categorical(), (draw(9, 5), classes(9)), source=source)
    assert report.settings["samples"] == 4
    report.raise_if(scale=0.01)


# ------------------------------------------------------------------------------------------------ tolerances
def check(**changes: Any) -> LayerCheck:
    values = dict.fromkeys((field.name for field in fields(LayerCheck) if field.name.endswith("_factor")), None)
    exact = {"scale_sampling": 0.0, "error_sampling": 0.0, "left_out": 0.0, "norm_ratio": 1.0}
    plain = {"layer": "a", "block": "dense", "parameters": 4, "cosine": 0.9, "scale": 1.1, "error": 0.3}
    return LayerCheck(**(values | exact | plain | changes))


@pytest.mark.parametrize(
    ("changes", "tolerances", "passes"),
    [
        ({}, {"scale": 0.0}, True),
        ({}, {"trace": 0.11}, True),
        ({}, {"trace": 0.09}, False),
        ({"scale": 0.9}, {"trace": 0.09}, False),
        ({"scale_sampling": 0.01}, {"trace": 0.07}, True),
        ({"scale_sampling": 0.01}, {"trace": 0.05}, False),
        ({"trace_factor": 0.9, "scale_sampling": 1.0}, {"scale": 0.09}, False),
        ({"trace_factor": 0.9}, {"scale": 0.11}, True),
        ({"input_factor": 1.0, "output_factor": 1.0}, {"scale": 0.0}, True),
        ({"input_factor": 1.1, "output_factor": 1.0}, {"scale": 0.05}, False),
        ({"input_factor": 1.0, "output_factor": 1.1}, {"scale": 0.05}, False),
        ({"input_factor": 1.0, "output_factor": math.nan}, {"scale": 10.0}, False),
        ({}, {"error": 0.3}, True),
        ({}, {"error": 0.2}, False),
        ({"error_sampling": 0.03}, {"error": 0.2}, True),
        ({}, {"cosine": 0.9}, True),
        ({}, {"cosine": 0.91}, False),
        ({"error_sampling": 0.03}, {"cosine": 0.91}, True),
        ({"error_sampling": 0.03}, {"cosine": 0.94}, True),
        ({"error_sampling": 0.03}, {"cosine": 0.96}, False),
        ({"error_sampling": 0.03, "norm_ratio": 10.0}, {"cosine": 0.94}, False),
        ({"cosine": math.nan}, {"cosine": 0.0}, False),
        ({"error": math.inf}, {"error": 10.0}, False),
        ({"scale": math.nan}, {"trace": 10.0}, False),
    ],
)
def test_tolerances(changes: dict[str, Any], tolerances: dict[str, float], passes: bool) -> None:
    report = VerificationReport((check(**changes),), {}, SeedCheck(1.0, 0.0), {}, ())
    if passes:
        report.raise_if(**tolerances)
    else:
        with pytest.raises(VerificationError, match="  a: "):
            report.raise_if(**tolerances)


def test_bad_tolerances() -> None:
    report = VerificationReport((check(),), {}, SeedCheck(1.0, 0.0), {}, ())
    with pytest.raises(ValueError, match="needs a tolerance"):
        report.raise_if()
    with pytest.raises(ValueError, match="scale=-1"):
        report.raise_if(scale=-1)
    with pytest.raises(ValueError, match=r"cosine=1.5 must be between 0 and 1"):
        report.raise_if(cosine=1.5)
    with pytest.raises(ValueError, match="error=nan"):
        report.raise_if(error=math.nan)


# ------------------------------------------------------------------------------------------------ the report
def test_text_plain_data_and_table() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, groups=1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    report = kf.verify(model.train(), kf.Categorical(), (draw(5, 1, 4, 4).float(), classes(5)))
    text = str(report)
    lines = text.splitlines()
    assert "source sampled" in lines[0]
    assert "samples 1" in lines[0]
    assert lines[2].split("  ")[0] == "layer"
    assert "±" in text
    assert "couples the examples" in text
    assert all(line == line.rstrip() for line in lines)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["rows"][0]["cosine"] == report.rows[0].cosine
    assert data["settings"]["examples"] == 5
    pytest.importorskip("pandas")
    assert {"layer", "cosine", "scale", "error", "scale_sampling", "error_sampling"} <= set(report.table.columns)
    assert list(report.table["layer"]) == ["0", "1", "3"]
    assert repr(report).startswith("VerificationReport(3 layers, smallest cosine 0.")


def test_what_has_no_block_is_named_and_not_compared(recwarn: pytest.WarningsRecorder) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.head = nn.Bilinear(3, 3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.pair(x, x)))

    report = kf.verify(double(Model()), kf.Categorical(), (draw(4, 3), classes(4, 2)), source="exact")
    assert [row.layer for row in report.rows] == ["head"]
    assert set(report.uncovered) == {"pair.weight", "pair.bias"}
    assert "pair.weight" in str(report)
    assert not recwarn.list, "the report itself says so"


def test_layers_with_zero_curvature_agree() -> None:
    model = double(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    report = kf.verify(model, kf.Categorical(), (draw(4, 3), classes(4, 2)))
    dead = row_of(report, "0")
    assert (dead.cosine, dead.scale, dead.error, dead.output_factor) == (1.0, 1.0, 0.0, 1.0)
    report.raise_if(scale=0.01)


def test_inputs_as_keywords_and_outputs_picked() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor, *, shift: float) -> dict[str, Tensor]:
            return {"logits": self.head(x + shift)}

    batch = ({"x": draw(4, 3), "shift": 1.0}, classes(4, 2))
    report = kf.verify(
        double(Model()),
        kf.Categorical(),
        batch,
        approximation="dense",
        source="exact",
        outputs=lambda out: out["logits"],
    )
    report.raise_if(error=1e-8)


# ------------------------------------------------------------------------------------------------ bad input
BATCH = (draw(4, 5), classes(4))


@pytest.mark.parametrize("source", ["empirical", "forward_only", kf.sources.Empirical()])
def test_sources_of_other_matrices_are_refused(source: Any) -> None:
    with pytest.raises(ValueError, match="does not estimate the Gauss-Newton"):
        kf.verify(small(), kf.Categorical(), BATCH, source=source)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"batch": draw(4, 5)}, TypeError, "pair"),
        ({"batch": [BATCH, BATCH, BATCH]}, TypeError, "next\\(iter"),
        ({"model": "net"}, TypeError, "Module"),
        ({"model": nn.Linear(5, 3).half()}, ValueError, "float16"),
        ({"model": nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)).double()}, ValueError, "dropout"),
        ({"likelihood": nn.CrossEntropyLoss()}, TypeError, "likelihood_of"),
        ({"samples": 0}, ValueError, "samples"),
        ({"approximation": "kfa"}, ValueError, "kfa"),
        ({"source": "exactly"}, ValueError, "exactly"),
        ({"batch": (draw(4, 5), classes(4) + 3)}, ValueError, "class indices"),
        ({"outputs": lambda out: [out]}, TypeError, "list"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = {"model": small(), "likelihood": kf.Categorical(), "batch": BATCH} | changes
    with pytest.raises(error, match=text):
        kf.verify(**arguments)


@pytest.mark.parametrize(("count", "what"), [(40, "120 outputs x 120 outputs"), (6, "18 outputs x 24 parameters")])
def test_too_much_memory_says_which_batch_would_do(count: int, what: str) -> None:
    model, x, y, limit = small(), draw(count, 5), classes(count), 15_000
    with pytest.raises(ValueError, match=f"{what}.* at most [0-9]+ examples") as caught:
        kf.verify(model, kf.Categorical(), (x, y), memory_limit=limit)
    fits = int(str(caught.value).split("at most ")[1].split()[0])
    kf.verify(model, kf.Categorical(), (x[:fits], y[:fits]), memory_limit=limit)
    with pytest.raises(ValueError, match="at most"):
        kf.verify(model, kf.Categorical(), (x[: fits + 1], y[: fits + 1]), memory_limit=limit)


def test_a_layer_too_large_for_one_example() -> None:
    with pytest.raises(ValueError, match=r"one example alone needs 3.38 KiB"):
        kf.verify(small(), kf.Categorical(), BATCH, memory_limit=1000)


def test_without_pandas_the_table_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    report, real = VerificationReport((check(),), {}, SeedCheck(1.0, 0.0), {}, ()), builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pandas":
            raise ModuleNotFoundError("No module named 'pandas'", name="pandas")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModuleNotFoundError, match=r"kronfac\[experiments\]"):
        _ = report.table
