from __future__ import annotations

import math
import warnings

import pytest
import torch
from tests.exactness_helpers import double, draw, positions, seeded
from torch import Tensor, nn

import kronfac as kf
from kronfac.analysis import NETWORK, approximation_error, to_frame
from kronfac.approximations import APPROXIMATIONS
from kronfac.estimator import CoverageWarning
from kronfac.layers import adapt_model


def classifier() -> nn.Module:
    return double(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))


def network() -> nn.Module:
    """Grouped convolution, batch norm and a linear layer: stacks, units and positions."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2), nn.BatchNorm2d(4), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3)
    )
    return double(model).eval()


CASES = {
    "linear": (classifier, (5,)),
    "convolution": (network, (2, 3, 3)),
}


def data_for(shape: tuple[int, ...], examples: int = 6) -> tuple[Tensor, Tensor]:
    return draw(examples, *shape), torch.randint(0, 3, (examples,), generator=seeded(1))


def flat_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(model(x), y)
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


def angle(left: Tensor, right: Tensor) -> float:
    return float(left @ right / left.norm() / right.norm())


def damped(matrix: Tensor, damping: float) -> Tensor:
    return matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("approximation", ["kfac", "diagonal", "dense"])
@pytest.mark.parametrize("norm", ["full", "unitwise"])
def test_figures_are_those_of_dense_matrices(case: str, approximation: str, norm: str) -> None:
    build, shape = CASES[case]
    model, (x, y) = build(), data_for(shape)
    rows = approximation_error(
        model, kf.Categorical(), (x, y), approximations=approximation, sources="exact", norm=norm
    )
    exact, gradient = kf.reference.ggn(model, kf.Categorical(), x, y), flat_gradient(model, x, y)
    curvature = kf.estimate(model, kf.Categorical(), (x, y), approximation=approximation, source="exact", norm=norm)
    adapters = adapt_model(model, norm=norm).adapters
    assert [row["layer"] for row in rows] == [*adapters, NETWORK]
    wide = torch.zeros_like(exact)
    damping = 0.1 * float(exact.trace()) / len(exact)
    for row in rows[:-1]:
        place = positions(model, adapters[row["layer"]]).flatten()
        wanted, found = exact[place][:, place], curvature.blocks[row["layer"]].to_dense()
        wide[place.unsqueeze(1), place] = wanted
        steps = [torch.linalg.solve(damped(matrix, damping), gradient[place]) for matrix in (wanted, found)]
        figures = {
            "error": float((found - wanted).norm() / wanted.norm()),
            "distance": float((found - wanted).norm()),
            "exact_norm": float(wanted.norm()),
            "trace_ratio": float(found.trace() / wanted.trace()),
            "cosine": angle(found.flatten(), wanted.flatten()),
            "update_cosine": angle(*steps),
            "damping": damping,
            "parameters": len(wanted),
        }
        assert {key: row[key] for key in figures} == pytest.approx(figures, rel=1e-8, abs=1e-8)
        assert row["refused"] is None
    found = curvature.to_dense()
    step = torch.linalg.solve(damped(found, damping), gradient)
    figures = {
        "error": float((found - wide).norm() / wide.norm()),
        "trace_ratio": float(found.trace() / wide.trace()),
        "cosine": angle(found.flatten(), wide.flatten()),
        "update_cosine": angle(step, torch.linalg.solve(damped(wide, damping), gradient)),
        "full_update_cosine": angle(step, torch.linalg.solve(damped(exact, damping), gradient)),
    }
    assert {key: rows[-1][key] for key in figures} == pytest.approx(figures, rel=1e-8, abs=1e-8)


def test_the_exact_block_has_no_error() -> None:
    rows = approximation_error(
        classifier(), kf.Categorical(), data_for((5,)), approximations="dense", sources="exact", damping=1e-3
    )
    for row in rows:
        assert row["error"] < 1e-12
        assert row["cosine"] == pytest.approx(1, abs=1e-12)
        assert row["update_cosine"] == pytest.approx(1, abs=1e-10)
        assert row["damping"] == 1e-3
    assert rows[-1]["full_update_cosine"] < 1 - 1e-6  # blocks between layers are not in it


@pytest.mark.parametrize("examples", [2, 40])
def test_both_ways_to_solve_with_the_exact_matrix_agree(examples: int) -> None:
    from kronfac.analysis.exact import damped_solve

    roots, gradient = draw(examples, 12), draw(12, seed=2)
    solved = damped_solve(roots, gradient, 1e-4)
    torch.testing.assert_close(damped(roots.T @ roots, 1e-4) @ solved, gradient, rtol=1e-9, atol=1e-9)


def test_batches_count_as_one_data_set() -> None:
    model, (x, y) = classifier(), data_for((5,))
    whole = approximation_error(model, kf.Categorical(), (x, y), approximations="kfac", sources="exact")
    parts = approximation_error(
        model, kf.Categorical(), [(x[:2], y[:2]), (x[2:], y[2:])], approximations="kfac", sources="exact"
    )
    for one, other in zip(whole, parts, strict=True):
        assert one["error"] == pytest.approx(other["error"], rel=1e-10)
        assert one["update_cosine"] == pytest.approx(other["update_cosine"], rel=1e-10)


def test_a_sum_loss_changes_no_relative_figure() -> None:
    model, data = classifier(), data_for((5,))
    mean = approximation_error(model, kf.Categorical(), data, approximations="kfac", sources="exact")
    total = approximation_error(
        model, kf.Categorical(reduction="sum"), [data, data], approximations="kfac", sources="exact"
    )
    for one, other in zip(mean, total, strict=True):
        assert other["distance"] == pytest.approx(12 * one["distance"], rel=1e-9)  # six examples, twice
        assert other["update_cosine"] == pytest.approx(one["update_cosine"], rel=1e-9)


def test_more_samples_bring_the_sampled_source_nearer_to_the_exact_one() -> None:
    model, data = classifier(), data_for((5,))

    def error(samples: int) -> float:
        rows = approximation_error(
            model, kf.Categorical(), data, approximations="dense", sources="sampled", samples=samples
        )
        assert rows[-1]["samples"] == samples
        return rows[-1]["error"]

    assert error(4000) < 0.05 < error(1)


def test_layers_are_looked_at_alone_and_the_model_is_left_as_it_was() -> None:
    model = classifier().float()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    data = data_for((5,))
    both = approximation_error(model, kf.Categorical(), data, approximations="kfac", sources="exact")
    one = approximation_error(model, kf.Categorical(), data, approximations="kfac", sources="exact", layers=["2"])
    assert [row["layer"] for row in one] == ["2", NETWORK]
    assert one[0]["error"] == pytest.approx(both[1]["error"], rel=1e-12)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None


def test_every_registered_approximation_is_looked_at_by_default() -> None:
    rows = approximation_error(classifier(), kf.Categorical(), data_for((5,)))
    assert {(row["approximation"], row["source"]) for row in rows} == {
        (name, source) for name in APPROXIMATIONS for source in ("exact", "sampled")
    }
    frame = to_frame(rows)
    assert len(frame) == len(rows)
    assert {"layer", "error", "update_cosine", "refused"} <= set(frame.columns)


def test_a_refusal_is_a_row_with_its_reason() -> None:
    class Picky(kf.approximations.KFAC):
        name = "picky"

        def start(self, layer: object) -> object:
            raise ValueError("picky takes no layer")

    rows = approximation_error(
        classifier(), kf.Categorical(), data_for((5,)), approximations=[Picky(), "kfac"], sources="exact"
    )
    assert rows[0]["approximation"] == "picky"
    assert rows[0]["refused"] == "picky takes no layer"
    assert rows[0]["error"] is None
    assert [row["refused"] for row in rows[1:]] == [None] * 3


def test_too_large_models_are_refused_with_what_would_fit() -> None:
    model, (x, y) = classifier(), data_for((5,), 60)
    with pytest.raises(
        ValueError, match=r"39 parameters with 60 examples of 3 outputs needs .* at most (\d+) examples"
    ):
        approximation_error(model, kf.Categorical(), (x, y), memory_limit=100_000)
    with pytest.raises(ValueError, match=r"layers=\['2', ...\].*source='sampled'") as caught:
        approximation_error(model, kf.Categorical(), (x, y), memory_limit=100_000)
    fitting = int(str(caught.value).split("at most ")[1].split(" ")[0])
    approximation_error(model, kf.Categorical(), (x[:fitting], y[:fitting]), memory_limit=100_000)
    with pytest.raises(ValueError, match="at most"):
        approximation_error(model, kf.Categorical(), (x[: fitting + 1], y[: fitting + 1]), memory_limit=100_000)
    with pytest.raises(ValueError, match="one example alone is too much"):
        approximation_error(model, kf.Categorical(), (x, y), memory_limit=1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"approximations": "kfacs"}, "kfacs"),
        ({"sources": "empirical"}, "does not estimate the Gauss-Newton"),
        ({"sources": "nowhere"}, "nowhere"),
        ({"layers": ["9"]}, "no layer '9'"),
        ({"layers": []}, "empty"),
        ({"damping": 0.0}, "must be positive"),
        ({"damping": math.nan}, "damping"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        approximation_error(classifier(), kf.Categorical(), data_for((5,)), **options)  # type: ignore[arg-type]


def test_batch_norm_in_train_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"couples the examples.*model\.eval\(\)"):
        approximation_error(network().train(), kf.Categorical(), data_for((2, 3, 3)))


def test_parameters_without_a_block_are_warned_of_once() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.layer = nn.Parameter(torch.ones(3)), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.layer(x)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        approximation_error(double(Scaled()), kf.Categorical(), data_for((5,)), approximations=["kfac", "diagonal"])
    assert [warning.category for warning in caught] == [CoverageWarning]
    assert "scale" in str(caught[0].message)
