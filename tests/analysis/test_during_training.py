from __future__ import annotations

import pytest
import torch
from tests.analysis.test_error import classifier, data_for
from torch import nn

import kronfac as kf
from kronfac.analysis import NETWORK, approximation_error, error_during_training
from kronfac.analysis.exact import gather
from kronfac.analysis.scene import Scene


def test_errors_are_those_of_the_model_at_the_time() -> None:
    model, data = classifier().train(), data_for((5,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    heard: list[int] = []

    def advance() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()

    start = approximation_error(model, kf.Categorical(), data, approximations="kfac", sources="exact")
    rows = error_during_training(
        model,
        kf.Categorical(),
        data,
        advance,
        steps=5,
        every=2,
        approximations=["kfac", "diagonal"],
        record=lambda step, found: heard.append(step),
    )
    assert heard == [0, 2, 4, 5]
    assert model.training
    own = [row for row in rows if row["approximation"] == "kfac"]
    first, last = [row for row in own if row["step"] == 0], [row for row in own if row["step"] == 5]
    end = approximation_error(model, kf.Categorical(), data, approximations="kfac", sources="exact")
    for found, wanted in ((first, start), (last, end)):
        assert [row["error"] for row in found] == pytest.approx([row["error"] for row in wanted], rel=1e-12)
    assert first[0]["error"] != last[0]["error"]
    assert last[-1]["layer"] == NETWORK
    assert last[-1]["distance_sum"] == pytest.approx(sum(row["distance"] for row in last[:-1]))


def test_pairs_make_the_exact_block() -> None:
    model, data = classifier(), data_for((5,))
    exact = gather(Scene.of(model, kf.Categorical(), data), 1 << 30, keep_pairs=True)
    for layer, (a, u) in exact.pairs.items():
        roots = exact.roots[layer].flatten(1)
        pairs = torch.einsum("ko,ki->koi", u, a).flatten(1)
        torch.testing.assert_close(pairs.T @ pairs / len(pairs), roots.T @ roots)


def test_errors_stay_within_their_bounds() -> None:
    rows = error_during_training(
        classifier(),
        kf.Categorical(),
        data_for((5,)),
        lambda: None,
        steps=0,
        every=1,
        approximations=["kfac", "tkfac", "diagonal"],
    )
    for row in rows:
        assert (row["bound"] is None) == (row["approximation"] == "diagonal")
        if row["bound"] is not None:
            assert row["distance"] <= row["bound"]


@pytest.mark.parametrize(
    ("steps", "every", "named"),
    [(1, 0, "every"), (3, 1.5, "every"), (-1, 1, "steps"), (2.5, 1, "steps"), (True, 1, "steps")],
)
def test_bad_intervals_are_named(steps: object, every: object, named: str) -> None:
    """A fraction among them, of which only some multiples are steps."""
    with pytest.raises(ValueError, match=f"{named} must be a whole number of at least"):
        error_during_training(
            classifier(),
            kf.Categorical(),
            data_for((5,)),
            lambda: None,
            steps=steps,
            every=every,  # type: ignore[arg-type]
        )
