"""Searches: where they look, what they try, and that they go on where they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kronfac import experiments
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.progress import Progress
from kronfac.experiments.search import Range, Search, Trials, axes_of, near_an_end, read_axis

pytest.importorskip("optuna")


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("0.01:1", Range(0.01, 1.0)),
        ("0.5:0.99", Range(0.5, 0.99)),
        ("1:50", Range(1, 50, whole=True)),
        ("1e-4:1", Range(1e-4, 1.0)),
        ("factored,exact", ("factored", "exact")),
        ("auto", ("auto",)),
    ],
)
def test_axes_are_read(text: str, axis: object) -> None:
    assert read_axis(text) == axis


@pytest.mark.parametrize("text", ["1:0.1", "1:1", "a:b", "1:2:3", "0:inf", "nan:1"])
def test_ranges_that_are_none(text: str) -> None:
    with pytest.raises(ExperimentError, match="a range is low:high"):
        read_axis(text)


def test_wide_ranges_are_logarithmic() -> None:
    assert Range(0.01, 1.0).logarithmic
    assert not Range(0.5, 0.99).logarithmic
    assert not Range(0.0, 100.0).logarithmic


def test_the_default_is_around_what_the_problem_has() -> None:
    kfac = get_optimizer("kfac")
    base = kfac.resolve({"lr": 0.03, "damping": 0.01})
    assert axes_of(kfac, base, {}) == {"lr": Range(0.001, 0.9), "damping": Range(0.000333, 0.3)}
    given = {"momentum": Range(0.5, 0.99)}
    assert axes_of(kfac, base, given) == given
    with pytest.raises(ExperimentError, match="kfac has no hyper-parameter 'foo'"):
        axes_of(kfac, base, {"foo": Range(0.0, 1.0)})
    with pytest.raises(ExperimentError, match=r"kfac\.momentum must be"):
        axes_of(kfac, base, {"momentum": Range(0.5, 1.5)})
    with pytest.raises(ExperimentError, match="no learning rate and no damping"):
        axes_of(get_optimizer("adaptive_kfac"), get_optimizer("adaptive_kfac").resolve(), {})


def search_quadratic(seed: int, count: int) -> list[tuple[dict[str, object], float]]:
    axes = {"lr": Range(1e-4, 1.0), "every": Range(1, 20, whole=True), "rule": ("a", "b")}
    trials, found = Trials(axes, {"lr": 0.1, "every": 10, "rule": "b"}, seed), []
    for _ in range(count):
        point = trials.ask()
        value = (float(point["lr"]) - 0.01) ** 2 + (point["rule"] == "b")  # type: ignore[arg-type]
        trials.tell(value if point["every"] != 3 else float("inf"))
        found.append((point, value))
    return found


def test_trials_begin_with_what_there_is_repeat_and_find_the_best() -> None:
    found = search_quadratic(0, 30)
    assert found[0][0] == {"lr": 0.1, "every": 10, "rule": "b"}
    assert found == search_quadratic(0, 30)
    assert found[:12] == search_quadratic(0, 12), "more trials add to those that were done"
    assert found[1:] != search_quadratic(1, 30)[1:]
    assert all(1e-4 <= float(p["lr"]) <= 1.0 and isinstance(p["every"], int) for p, _ in found)  # type: ignore[arg-type]
    best = min(found, key=lambda pair: pair[1])[0]
    assert best["rule"] == "a"
    assert abs(float(best["lr"]) - 0.01) < 0.02  # type: ignore[arg-type]
    late = [p["rule"] for p, _ in found[15:]]
    assert late.count("a") > late.count("b"), "later trials know of earlier ones"


def test_ends() -> None:
    assert near_an_end((0.001, 1.0), 0.95)
    assert near_an_end((0.001, 1.0), 0.00105)
    assert not near_an_end((0.001, 1.0), 0.5)
    assert near_an_end((0.0, 1.0), 0.95)
    assert not near_an_end((0.0, 1.0), 0.5)


SEARCH = Search(4, {"kfac": {"lr": Range(0.01, 0.3)}})


def sweep(out: Path, **options: object) -> experiments.Results:
    values: dict[str, object] = {"steps": 6, "evaluate_every": 3, "threads": 1, "search": SEARCH, **options}
    return experiments.compare("digits-mlp", ["sgd", "kfac"], out=out, **values)  # type: ignore[arg-type]


class Stop(Progress):
    """Ctrl-C once so many runs have ended."""

    def __init__(self, after: int) -> None:
        self.left = after

    def finished(self, settings: object, status: str, note: str) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_a_search_that_was_stopped_goes_on_with_the_same_points(tmp_path: Path) -> None:
    whole = sweep(tmp_path / "whole")
    assert [len(points) for points in whole.grids.values()] == [4, 4]
    best = min(whole.grids["kfac"], key=lambda point: point.result.final("train_loss"))
    assert whole.chosen["kfac"] == best.values
    assert len(whole.runs) == 2
    for after in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            sweep(tmp_path / "cut", progress=Stop(after))
    written = json.loads((tmp_path / "cut" / "comparison.json").read_text())["plan"]["tried"]
    assert len(written["sgd"]) == 4
    assert 0 < len(written["kfac"]) < 4
    partial = experiments.read_results(tmp_path / "cut")
    experiments.write_report(partial)
    resumed = sweep(tmp_path / "cut")
    assert resumed.plan.tried == whole.plan.tried
    assert resumed.chosen == whole.chosen
    more = sweep(tmp_path / "cut", search=Search(5, SEARCH.axes))
    assert [point.varied for point in more.grids["kfac"]][:4] == [point.varied for point in whole.grids["kfac"]]
    assert "Tuning" in (tmp_path / "cut" / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"search": Search(0, {})}, "trials must be a whole number of at least 1"),
        ({"search": Search(2, {"adam": {"lr": Range(0.01, 0.1)}})}, "a range is given for 'adam'"),
        ({"search": Search(2, {"nothing": {}})}, "unknown optimiser 'nothing'"),
        ({"grid": {"sgd": {"lr": [0.1]}}}, "a search and a grid are two ways"),
        ({"search": Search(2, {"sgd": {"momentum": ()}})}, r"sgd\.momentum: no values"),
    ],
)
def test_searches_that_do_not_fit_write_nothing(tmp_path: Path, options: dict[str, object], text: str) -> None:
    with pytest.raises(ExperimentError, match=text):
        sweep(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
