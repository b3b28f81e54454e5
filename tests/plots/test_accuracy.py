from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from kronfac.plots import accuracy_matrices


def test_heat_maps_show_every_accuracy() -> None:
    matrices = [[[0.9, 0.1], [0.5, 0.8]], [[0.9, 0.2], [0.7, 0.8]]]
    axes = accuracy_matrices(matrices, ["one", "two"], title="stream", columns=1)
    assert [a.get_title() for a in axes] == ["one: 65.0 %", "two: 75.0 %"]
    assert [text.get_text() for text in axes[0].texts] == ["90", "10", "50", "80"]
    assert axes[0].images[0].get_array().tolist() == matrices[0]
    assert len(axes[0].figure.axes) == 3  # two heat maps and the scale


def test_labels_and_matrices_must_agree() -> None:
    with pytest.raises(ValueError, match="got 2 for 1"):
        accuracy_matrices([[[1.0]]], ["one", "two"])
