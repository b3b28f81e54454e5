"""Correlations against their definitions, on maps whose correlations are known, and on a small network."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from tests.exactness_helpers import double, draw
from torch import Tensor, nn

import kronfac as kf
from kronfac.analysis import convolution_correlations, cross_map_correlation, spatial_autocorrelation
from kronfac.estimator import Estimator
from kronfac.tape import record


def pairs(x: Tensor, offset: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Values of one map at all pairs of locations ``offset`` apart."""
    here = [slice(max(0, -d), n - max(0, d)) for d, n in zip(offset, x.shape[1:], strict=True)]
    there = [slice(max(0, d), n + min(0, d)) for d, n in zip(offset, x.shape[1:], strict=True)]
    return x[(slice(None), *here)].flatten(), x[(slice(None), *there)].flatten()


@pytest.mark.parametrize("centred", [False, True])
def test_autocorrelation_by_going_through_the_offsets(centred: bool) -> None:
    x = draw(5, 2, 4, 3) + 0.5
    found = spatial_autocorrelation(x, centred=centred)
    assert found.shape == (2, 7, 5)
    for index in range(2):
        for dy in range(-3, 4):
            for dx in range(-2, 3):
                a, b = pairs(x[:, index], (dy, dx))
                if centred:
                    a, b = a - a.mean(), b - b.mean()
                wanted = (a @ b) / (a.norm() * b.norm())
                assert found[index, 3 + dy, 2 + dx] == pytest.approx(float(wanted), abs=1e-10)


@pytest.mark.parametrize("centred", [False, True])
def test_cross_map_correlation_by_definition(centred: bool) -> None:
    x = draw(5, 3, 4, 3) + 0.5
    columns = x.transpose(0, 1).flatten(1)
    columns = columns - columns.mean(1, keepdim=True) if centred else columns
    columns = columns / columns.norm(dim=1, keepdim=True)
    found = cross_map_correlation(x, centred=centred)
    torch.testing.assert_close(found, columns @ columns.T, rtol=1e-10, atol=1e-10)


def test_moving_averages_have_a_triangular_autocorrelation() -> None:
    """White noise averaged over w neighbours: ``1 - |d|/w`` along the line, nothing across it."""
    noise = draw(400, 1, 8, 20)
    x = sum(noise[..., i : i + 16] for i in range(4)) / 4
    found = spatial_autocorrelation(x, radius=5)[0]
    assert found.shape == (11, 11)
    wanted = torch.tensor([max(0.0, 1 - abs(d) / 4) for d in range(-5, 6)], dtype=torch.float64)
    torch.testing.assert_close(found[5], wanted, rtol=0, atol=6 / math.sqrt(400 * 128))
    assert found[[3, 4, 6, 7]].abs().max() < 6 / math.sqrt(400 * 64)


def test_other_numbers_of_dimensions() -> None:
    for shape in ((6, 2, 9), (6, 2, 3, 4, 2)):
        found = spatial_autocorrelation(draw(*shape))
        assert found.shape == (2, *(2 * n - 1 for n in shape[2:]))
        middle = tuple(n // 2 for n in found.shape[1:])
        torch.testing.assert_close(found[(slice(None), *middle)], torch.ones(2).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(found, found.flip(tuple(range(1, found.ndim))), rtol=0, atol=1e-12)
        assert found.abs().max() <= 1.0


def test_a_map_that_is_zero_has_no_correlation() -> None:
    x = draw(4, 3, 5, 5)
    x[:, 1] = 0.0
    spatial, cross = spatial_autocorrelation(x), cross_map_correlation(x)
    assert spatial[1].isnan().all()
    assert not spatial[[0, 2]].isnan().any()
    assert cross[1].isnan().all()
    assert not cross[[0, 2]][:, [0, 2]].isnan().any()
    x[:, 1] = 3.0  # constant: correlated with itself alone uncentred, with nothing centred
    assert cross_map_correlation(x, centred=True)[1].isnan().all()
    torch.testing.assert_close(spatial_autocorrelation(x)[1], torch.ones(9, 9).double())
    assert spatial_autocorrelation(x, centred=True)[1].isnan().all()


def model() -> nn.Module:
    return double(
        nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
        )
    ).eval()


def test_of_a_networks_convolutions() -> None:
    net, batches = model(), [(draw(6, 1, 6, 6), None), (draw(5, 1, 6, 6, seed=1), None)]
    found = convolution_correlations(net, kf.Categorical(), batches, seed=3)
    assert {entry.layer for entry in found} == {"0", "2"}
    assert len(found) == 4
    entries = {(entry.layer, entry.kind): entry for entry in found}
    inputs = torch.cat([x for x, _ in batches])
    read = {"0": inputs, "2": net[:2](inputs).detach()}
    for layer, maps in read.items():
        entry = entries[layer, "activations"]
        torch.testing.assert_close(entry.spatial, spatial_autocorrelation(maps), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(entry.cross_map, cross_map_correlation(maps), rtol=1e-9, atol=1e-9)
    # Derivatives: those of the same labels, drawn by the same generator.
    generator, pulled = torch.Generator().manual_seed(3), []
    estimator = Estimator(net, kf.Categorical())
    for x, _ in batches:
        with record(estimator.adaptation.adapters) as tape:
            outputs = net(x)
        (samples,) = estimator.source.samples(tape, kf.Categorical(), outputs, None, generator)
        pulled.append(next(s.cotangents for s in samples if s.layer.name == "2"))
    maps = torch.cat(pulled)
    entry = entries["2", "derivatives"]
    torch.testing.assert_close(entry.spatial, spatial_autocorrelation(maps), rtol=1e-9, atol=1e-9)
    assert entry.spatial.shape == (2, 7, 7)
    means = entry.by_distance()
    assert means[0] == pytest.approx(1.0)
    ring = torch.cat([entry.spatial[:, 2:5, 2:5].flatten(1)[:, [0, 1, 2, 3, 5, 6, 7, 8]]]).abs().mean()
    assert means[1] == pytest.approx(float(ring))
    assert len(entries["0", "derivatives"].between_maps()) == 3


def test_dead_maps_are_named_and_left_out() -> None:
    net = model()
    with torch.no_grad():
        net[0].bias[1] = -100.0
    found = convolution_correlations(net, kf.Categorical(), (draw(6, 1, 6, 6), None))
    entries = {(entry.layer, entry.kind): entry for entry in found}
    for key in (("0", "derivatives"), ("2", "activations")):
        assert entries[key].alive().tolist() == [0, 2]
        assert len(entries[key].between_maps()) == 1
        assert not entries[key].by_distance().isnan().any()
    assert entries["2", "derivatives"].alive().tolist() == [0, 1]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="radius=-1 must be at least 0"):
        spatial_autocorrelation(draw(2, 1, 4, 4), radius=-1)
    with pytest.raises(ValueError, match="no convolution with trained parameters"):
        convolution_correlations(nn.Linear(2, 3), kf.Categorical(), (draw(2, 2), None))
    with pytest.raises(ValueError, match="loader is empty"):
        convolution_correlations(model(), kf.Categorical(), [])
    pooled = nn.Sequential(nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    sizes = [(draw(2, 2, size, size), None) for size in (5, 7)]
    with pytest.raises(ValueError, match=r"derivatives of layer '0' are maps of size \(5, 5\) after .*\(3, 3"):
        convolution_correlations(pooled, kf.Categorical(), sizes)


def test_the_table_condenses_the_correlations() -> None:
    net, data = model(), (draw(6, 1, 6, 6), None)
    with torch.no_grad():
        net[0].bias[1] = -100.0
    rows = kf.analysis.autocorrelation(net, kf.Categorical(), data, radius=2, seed=3)
    frame = kf.analysis.to_frame(rows)
    assert list(frame.columns) == ["layer", "kind", "maps", "alive", "distance", "autocorrelation"]
    assert len(frame) == 4 * 3
    for entry in convolution_correlations(net, kf.Categorical(), data, radius=2, seed=3):
        own = frame[(frame["layer"] == entry.layer) & (frame["kind"] == entry.kind)]
        assert own["distance"].tolist() == [0, 1, 2]
        assert own["autocorrelation"].tolist() == pytest.approx(entry.by_distance().tolist())
        assert set(own["maps"]) == {len(entry.spatial)}
    assert set(frame[(frame["layer"] == "0") & (frame["kind"] == "derivatives")]["alive"]) == {2}


def test_the_module_of_the_tables_name_can_be_imported_from() -> None:
    """The package has the function under the name of the module, as for `alignment` and `spectrum`."""
    module = importlib.import_module("kronfac.analysis.autocorrelation")
    assert module.autocorrelation is kf.analysis.autocorrelation
    assert module.convolution_correlations is convolution_correlations
