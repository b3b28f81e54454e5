"""Spectra of the exact blocks and of their approximations."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from tests.exactness_helpers import double, draw
from torch import Tensor, nn

import kronfac as kf
from kronfac.analysis import Eigenvalue, eigenvalues, spectrum


def net() -> nn.Module:
    return double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3)))


def values(rows: list[Eigenvalue], layer: str, approximation: str) -> Tensor:
    found = [row for row in rows if (row.layer, row.approximation) == (layer, approximation)]
    assert [row.index for row in found] == list(range(len(found)))
    return torch.tensor([row.eigenvalue for row in found], dtype=torch.float64)


def test_the_exact_spectrum_is_that_of_the_oracles_blocks() -> None:
    model, x = double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))), draw(9, 3)
    rows = spectrum(model, kf.Categorical(), (x, None), approximations=["kfac", "nearest_kronecker", "diagonal"])
    dense = kf.reference.ggn(model, kf.Categorical(), x)
    for layer, place in (("0", slice(0, 16)), ("2", slice(16, 31))):
        wanted = torch.linalg.eigvalsh(dense[place, place]).flip(0)
        torch.testing.assert_close(values(rows, layer, "exact"), wanted.clamp_min(0), rtol=1e-9, atol=1e-14)
        diagonal = dense[place, place].diagonal().sort(descending=True).values
        torch.testing.assert_close(values(rows, layer, "diagonal"), diagonal, rtol=1e-9, atol=1e-14)
    for name in ("kfac", "nearest_kronecker"):
        blocks = kf.estimate(model, kf.Categorical(), (x, None), approximation=name, source="exact").blocks
        for layer, block in blocks.items():
            wanted = torch.linalg.eigvalsh(block.to_dense()).flip(0)
            torch.testing.assert_close(values(rows, layer, name), wanted.clamp_min(0), rtol=1e-9, atol=1e-13)


def test_rows_make_a_table_in_order() -> None:
    rows = spectrum(net(), kf.Categorical(), (draw(9, 3), None))
    table = pd.DataFrame(rows)
    assert list(table.columns) == ["layer", "approximation", "index", "eigenvalue"]
    assert list(dict.fromkeys(zip(table["layer"], table["approximation"], strict=True))) == [
        (layer, name) for layer in ("0", "2", "3") for name in ("exact", "kfac")
    ]
    assert table.groupby(["layer", "approximation"])["eigenvalue"].apply(lambda s: s.is_monotonic_decreasing).all()
    assert (table["eigenvalue"] >= 0).all()


def test_layers_that_are_not_asked_for_change_nothing_and_stay_trainable() -> None:
    model, data = net(), [(draw(5, 3), None), (draw(4, 3, seed=1), None)]
    whole = spectrum(model, kf.Categorical(), data)
    part = spectrum(model, kf.Categorical(), data, layers=["3"])
    assert {row.layer for row in part} == {"3"}
    for name in ("exact", "kfac"):
        torch.testing.assert_close(values(part, "3", name), values(whole, "3", name), rtol=1e-12, atol=1e-15)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model[0].requires_grad_(False)
    spectrum(model, kf.Categorical(), data, layers=["3"])
    assert [p.requires_grad for p in model.parameters()] == [False] * 2 + [True] * 4


def test_sampled_approximations_share_the_labels_of_the_exact_block() -> None:
    """A single example makes K-FAC exact for the same labels; for others it is not."""
    rows = spectrum(net(), kf.Categorical(), (draw(1, 3), None), source="sampled", layers=["3"])
    torch.testing.assert_close(values(rows, "3", "kfac"), values(rows, "3", "exact"), rtol=1e-9, atol=1e-14)


def test_large_layers_are_refused_with_their_size_and_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(99, 100), nn.Linear(100, 2))
    data = (torch.randn(3, 99, generator=torch.Generator().manual_seed(0)), None)
    with pytest.raises(ValueError, match=r"'0' \(10000x10000, 0\.75 GiB\) are too large .* layers=\['1'\] alone"):
        spectrum(model, kf.Categorical(), data)
    with pytest.raises(ValueError, match="use a smaller network, or raise limit="):
        spectrum(model, kf.Categorical(), data, layers=["0"])
    assert {row.layer for row in spectrum(model, kf.Categorical(), data, layers=["1"])} == {"1"}
    assert len(eigenvalues(kf.estimate(model, kf.Categorical(), data).blocks["0"])) == 10_000


def test_bad_arguments() -> None:
    data = (draw(5, 3), None)
    with pytest.raises(
        ValueError, match=r"layers \['7'\] have no curvature block; those that do are \['0', '2', '3'\]"
    ):
        spectrum(net(), kf.Categorical(), data, layers=["0", "7"])
    with pytest.raises(ValueError, match="'kfac_tridiagonal' couples them"):
        spectrum(net(), kf.Categorical(), data, approximations=["kfac_tridiagonal"])
    with pytest.raises(ValueError, match="'dense', the exact block, which is part"):
        spectrum(net(), kf.Categorical(), data, approximations=["dense"])
    with pytest.raises(ValueError, match="hold 'kfac' twice"):
        spectrum(net(), kf.Categorical(), data, approximations=["kfac", "kfac"])
    with pytest.raises(TypeError, match="must be a list of names or objects, not 'kfac' alone"):
        spectrum(net(), kf.Categorical(), data, approximations="kfac")
    with pytest.raises(ValueError, match="a list_iterator, which can be read only once"):
        spectrum(net(), kf.Categorical(), iter([data]))
    for layers in ("2", []):
        with pytest.raises(ValueError, match=r"layers=.* must be a list of names, of one layer at least"):
            spectrum(net(), kf.Categorical(), data, layers=layers)


def test_rows_of_dataclasses_make_a_frame() -> None:
    """`to_frame` takes the rows of every analysis."""
    data = (draw(5, 3), torch.zeros(5, dtype=torch.long))
    rows = spectrum(net(), kf.Categorical(), data)
    pd.testing.assert_frame_equal(kf.analysis.to_frame(rows), pd.DataFrame(rows))
    aligned = kf.analysis.alignment(net(), kf.Categorical(), data, ["kfac:exact"])
    pd.testing.assert_frame_equal(kf.analysis.to_frame(aligned), pd.DataFrame(aligned))
