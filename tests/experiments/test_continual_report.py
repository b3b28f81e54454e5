"""Reports of streams, and runs that fail beside others that do not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kronfac.experiments import continual
from kronfac.experiments.continual.points import read_grid
from kronfac.experiments.continual.results import read_results
from kronfac.experiments.errors import ExperimentError

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("plotly")
BUDGET = continual.Budget(steps=5)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> continual.Results:
    return continual.compare(
        "split-digits-cnn",
        ["finetune", "l2", "kkfac", "ewc"],
        out=tmp_path_factory.mktemp("report"),
        tasks=2,
        seeds=(0, 1),
        budget=BUDGET,
        settings={"ewc": {"lr": 1e20}},
        threads=1,
        command="run </script> & me",
    )


@pytest.fixture(scope="module")
def page(results: continual.Results) -> str:
    return (results.folder / "report.html").read_text()


def drawn(page: str, name: str) -> dict:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_needs_nothing_else_and_says_how_it_was_made(page: str) -> None:
    assert not re.findall(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=[\"'](?!data:)", page)
    assert "Plotly" in page
    for text in ("run &lt;/script&gt; &amp; me", "threads", "steps 5", "0, 1", "forward transfer [%]", "±"):
        assert text in page


def test_curves_and_heat_maps_are_means_over_seeds(results: continual.Results, page: str) -> None:
    data = drawn(page, "strategies")
    assert [one["title"] for one in data["series"]] == ["fine-tuning", "L2 anchor"]
    for one, name in zip(data["series"], ("finetune", "l2"), strict=True):
        first, second = (run["matrix"] for run in results.runs[name])
        assert one["matrix"][1][0] == pytest.approx(50 * (first[1][0] + second[1][0]))
        assert one["so_far"][0] == pytest.approx(50 * (first[0][0] + second[0][0]))
        assert one["so_far"][1] == pytest.approx(25 * sum(first[1] + second[1]))
        assert len(one["so_far_spread"]) == len(one["matrix_spread"]) == 2
    assert drawn(page, "grid") is None


def test_failures_do_not_keep_others_from_being_run(results: continual.Results, page: str) -> None:
    assert results.done == ["finetune", "l2"]
    assert [len(results.runs[name]) for name in results.strategies] == [2, 2, 0, 0]
    assert len(results.failures) == 4
    assert "diverged at step" in page
    assert "kkfac&#x27; is for nn.Linear layers" in page
    lines = [json.loads(line) for line in (results.folder / "results.jsonl").read_text().splitlines()]
    assert ["failure" in line for line in lines] == [False] * 4 + [True] * 4


def test_a_strategy_with_a_failed_seed_is_marked(results: continual.Results) -> None:
    failure = continual.Failure({"strategy": "l2", "seed": 1}, "diverged")
    runs = {**results.runs, "l2": results.runs["l2"][:1]}
    partly = continual.Results(results.stream, 2, results.folder, results.strategies, runs, [failure])
    table = continual.summary(partly)
    row = [cells[0] for cells in table.rows].index("L2 anchor")
    assert "1 of 2 seeds, others failed" in table.rows[row][1]
    assert table.marks == {row: "bad"}


def test_the_folder_gives_back_what_was_found(results: continual.Results, tmp_path: Path) -> None:
    again = read_results(results.folder)
    assert (again.strategies, again.tasks, again.failures) == (results.strategies, 2, results.failures)
    assert again.origin == results.origin
    assert [run["matrix"] for run in again.runs["l2"]] == [run["matrix"] for run in results.runs["l2"]]
    before = (results.folder / "report.html").read_text()
    assert continual.write_report(results.folder).read_text() == before
    with pytest.raises(ExperimentError, match="holds no runs of kronfac continual"):
        continual.write_report(tmp_path)
    (tmp_path / "strategies.json").write_text("{}")
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(ExperimentError, match="do not go together"):
        continual.write_report(tmp_path)


def test_a_grid_shows_target_against_average_accuracy(tmp_path: Path) -> None:
    folder = tmp_path / "grid"
    budget = continual.Budget(steps=5, held_out=100)
    axes = {"lr": [0.001, 0.01, 1e20]}
    grid = continual.search(
        "permuted-digits", ["finetune", "l2"], axes, out=folder, tasks=2, budget=budget, slack=1.0, threads=1
    )
    assert [len(points) for points in grid.panels().values()] == [2, 2]
    assert len(grid.failures) == 2
    page = (folder / "report.html").read_text()
    data = drawn(page, "grid")["series"]
    assert [one["title"] for one in data] == ["fine-tuning", "L2 anchor"]
    assert [sum(one["chosen"]) for one in data] == [1, 1]
    assert data[0]["target"] == [100 * point.target for point in grid.points[:2]]
    assert "Runs that failed" in page
    assert read_grid(folder) == grid
    # What is then compared in the same folder is shown with it.
    continual.compare("permuted-digits", ["finetune"], out=folder, tasks=2, budget=BUDGET, threads=1)
    page = (folder / "report.html").read_text()
    assert drawn(page, "grid")["series"] == data
    assert drawn(page, "strategies")["series"][0]["so_far_spread"] is None  # of one seed


def test_if_all_runs_fail_the_reason_is_the_error(tmp_path: Path) -> None:
    with pytest.raises(
        ExperimentError, match=r"l2 on permuted-digits, seed 0, diverged.*all 2 runs failed; this is the first"
    ):
        continual.compare(
            "permuted-digits",
            ["l2"],
            out=tmp_path,
            tasks=2,
            seeds=(0, 1),
            budget=continual.Budget(steps=5, lr=1e20),
            threads=1,
        )
