from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kronfac import experiments
from kronfac.experiments.environment import warning
from kronfac.experiments.progress import Progress


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    grid = {"sgd": {"lr": [0.001, 0.01, 0.1]}}
    experiments.compare(
        "digits-mlp",
        ["sgd", "adam"],
        steps=20,
        seeds=[0, 1],
        out=path,
        grid=grid,
        threads=1,
        command="run </script> & me",
    )
    return path


def test_the_page_needs_nothing_else(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert not re.findall(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=[\"'](?!data:)", page)
    assert "Plotly" in page
    assert page.count("<img alt=") == 1


def test_what_the_user_wrote_is_escaped(folder: Path) -> None:
    assert "run &lt;/script&gt; &amp; me" in (folder / "report.html").read_text()


def test_the_numbers_in_the_page_are_those_of_the_runs(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    found = re.search(r'<script type="application/json" id="curves">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    results = experiments.read_results(folder)
    assert len(data["runs"]) == 4
    for drawn, run in zip(data["runs"], results.runs, strict=True):
        assert drawn["columns"]["train_loss"] == [record["train_loss"] for record in run.evaluations]


def test_the_page_states_settings_environment_and_command(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    for text in ("momentum=0.9", "torch", "threads", "2 seeds"):
        assert text in page


def test_a_busy_machine_is_pointed_out() -> None:
    assert "load 3.5 on 2 cores" in warning({"load at the start": 3.5, "cores": 2})
    assert warning({"load at the start": 1.5, "cores": 2}) == ""
    assert warning({}) == ""


def test_an_unfinished_comparison_can_be_reported(tmp_path: Path) -> None:
    class Stop(Progress):
        def started(self, settings: object, step: int) -> None:
            if getattr(settings, "optimizer", "") == "adam":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiments.compare("digits-mlp", ["sgd", "adam"], steps=20, out=tmp_path, threads=1, progress=Stop())
    results = experiments.read_results(tmp_path)
    assert [run.status for run in results.runs] == ["done", "unfinished"]
    assert experiments.write_report(results).exists()
    assert list(experiments.summary(results)["status"]) == ["done", "unfinished"]
