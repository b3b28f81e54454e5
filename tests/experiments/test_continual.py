"""Streams of tasks, and strategies that learn them."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kronfac.continual import base as continual_base
from kronfac.experiments import continual
from kronfac.experiments.continual import runner, views
from kronfac.experiments.continual.memories import Options
from kronfac.experiments.continual.points import Point
from kronfac.experiments.continual.strategies import get_strategy
from kronfac.experiments.continual.tables import choices, correlation
from kronfac.experiments.continual.tasks import Task, rotate
from kronfac.experiments.errors import CheckpointError, ExperimentError

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
SMALL = {"tasks": 3, "budget": continual.Budget(epochs=2), "threads": 1}


def _images(task: Task) -> Tensor:
    """Training images as the network takes them."""
    return task.arrange(task.train_inputs)


def test_tasks_that_do_not_fit_into_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    images = continual.get_stream("permuted-digits").tasks(1, 0)[0]
    one = images.train_inputs.nbytes + images.test_inputs.nbytes
    monkeypatch.setattr("kronfac.experiments.continual.streams.free_memory", lambda: 3 * one)
    assert len(continual.get_stream("rotated-digits").tasks(3, 0)) == 3
    assert len(continual.get_stream("permuted-digits").tasks(9, 0)) == 9  # one set of images, arranged as it is read
    assert len(continual.get_stream("split-digits").tasks(5, 0)) == 5  # shares it out
    with pytest.raises(ExperimentError, match=r"4 tasks of rotated-digits take .* GiB are free: take fewer tasks"):
        continual.get_stream("rotated-digits").tasks(4, 0)


@pytest.mark.parametrize("name", ["permuted-digits", "rotated-digits", "split-digits", "split-digits-cnn"])
def test_streams_are_a_function_of_their_seed(name: str) -> None:
    stream = continual.get_stream(name)
    one, two, other = stream.tasks(5, 0), stream.tasks(5, 0), stream.tasks(5, 1)
    for left, right in zip(one, two, strict=True):
        assert left.name == right.name
        assert torch.equal(_images(left), _images(right))
        assert torch.equal(left.test_targets, right.test_targets)
    same = all(
        _images(a).shape == _images(b).shape and torch.equal(_images(a), _images(b))
        for a, b in zip(one, other, strict=True)
    )
    assert same == (name == "rotated-digits")
    model = stream.model(0)
    for task in one:
        logits = task.outputs(model(_images(task)[:4]))
        assert logits.shape == (4, 2 if name.startswith("split") else 10)
        assert int(task.train_targets.max()) == logits.shape[1] - 1


def test_permutations_keep_the_pixels() -> None:
    tasks = continual.get_stream("permuted-digits").tasks(3, 0)
    for task in tasks[1:]:
        assert not torch.equal(_images(task), _images(tasks[0]))
        assert torch.equal(_images(task).sort(1).values, _images(tasks[0]).sort(1).values)
        inputs, targets = next(task.tests(200))
        assert torch.equal(inputs.sort(1).values, next(tasks[0].tests(200))[0].sort(1).values)
        assert torch.equal(inputs[0], _images(replace(task, train_inputs=task.test_inputs))[0])
        assert torch.equal(targets, task.test_targets[:200])
        assert task.train_inputs is tasks[0].train_inputs  # fifty tasks take the memory of one


def test_pixels_are_what_the_stream_says() -> None:
    plain, inverted = (continual.get_stream(f"permuted-mnist-{name}-bn") for name in ("plain", "inverted"))
    assert (plain.pixels, inverted.pixels) == ("plain", "inverted")
    shown = continual.get_stream("permuted-digits-inverted-bn").tasks(2, 0)
    plain_digits = replace(continual.get_stream("permuted-digits-bn"), pixels="plain").tasks(2, 0)
    for dark, bright in zip(plain_digits, shown, strict=True):
        assert torch.equal(_images(bright), 1 - _images(dark))
        assert torch.equal(bright.test_inputs, 1 - dark.test_inputs)
        assert (float(_images(dark).min()), float(_images(dark).max())) == (0.0, 1.0)


def test_splits_share_the_classes_out() -> None:
    tasks = continual.get_stream("split-digits").tasks(5, 0)
    assert sorted(c for task in tasks for c in task.classes) == list(range(10))
    assert sum(len(task.train_inputs) for task in tasks) == 1500
    with pytest.raises(ExperimentError, match="two at least: tasks must be one of \\[1, 2, 5\\], got 3"):
        continual.get_stream("split-digits").tasks(3, 0)


def test_rotation_by_quarters_moves_pixels_exactly() -> None:
    images = torch.arange(18.0).view(1, 2, 3, 3)
    torch.testing.assert_close(rotate(images, 90), torch.rot90(images, 1, (2, 3)), atol=1e-4, rtol=0)
    torch.testing.assert_close(rotate(images, 180), torch.rot90(images, 2, (2, 3)), atol=1e-4, rtol=0)
    assert rotate(images, 0) is images


def test_metrics_of_a_known_matrix() -> None:
    matrix = [[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.5, 0.7, 0.9]]
    found = continual.metrics_of([0.1, 0.1, 0.1], matrix)
    assert found.average_accuracy == pytest.approx(0.7)
    assert found.backward_transfer == pytest.approx((0.5 - 0.9 + 0.7 - 0.8) / 2)
    assert found.forward_transfer == pytest.approx((0.2 - 0.1 + 0.3 - 0.1) / 2)
    assert found.forgetting == pytest.approx((0.9 - 0.5 + 0.8 - 0.7) / 2)
    alone = continual.metrics_of([0.1], [[0.9]])
    assert alone.average_accuracy == 0.9
    assert math.isnan(alone.forgetting)


def test_penalties_forget_less_than_fine_tuning(tmp_path: Path) -> None:
    strategies = ["finetune", "ewc", "online-ewc", "online-kfac"]
    results = continual.compare(
        "permuted-digits", strategies, out=tmp_path, tasks=3, budget=continual.Budget(epochs=5), threads=1
    )
    average = {name: results.metrics(name)[0].average_accuracy for name in strategies}
    for name in strategies[1:]:
        assert average[name] > average["finetune"] + 0.02, average
    assert (tmp_path / "accuracy-matrices.png").stat().st_size > 10_000
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["settings"]["strategy"] for line in lines] == strategies
    assert lines[0]["average_accuracy"] == average["finetune"]


def rows_of(folder: Path) -> dict[str, list[dict[str, object]]]:
    found = {}
    for path in sorted(folder.glob("runs/*/metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.parent.name] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    return found


class Stops(continual.Listener):
    """Ctrl-C within a task."""

    def __init__(self, after: int) -> None:
        self.left = after

    def learned(self, plan, task, accuracies) -> None:
        self.left -= 1

    def stepped(self, fraction: float) -> None:
        if self.left == 0 and fraction > 0.3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("strategy", ["joint", "l2", "online-ewc", "kfac", "ekfac"])
def test_a_resumed_run_equals_an_uninterrupted_one(strategy: str, tmp_path: Path) -> None:
    for after in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            continual.compare(
                "permuted-digits",
                [strategy],
                out=tmp_path / "stopped",
                listener=Stops(after if after == 1 else 1),
                **SMALL,
            )
        assert [len(rows) for rows in rows_of(tmp_path / "stopped").values()] == [after]
    continual.compare("permuted-digits", [strategy], out=tmp_path / "stopped", **SMALL)
    continual.compare("permuted-digits", [strategy], out=tmp_path / "whole", **SMALL)
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")
    folder = next((tmp_path / "whole" / "runs").iterdir())
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "result.json", "settings.json"]


@pytest.mark.parametrize(
    "strategy",
    [
        "l2",
        "kkfac",
        "online-kkfac",
        "online-xkfac",
        "fixed-bn",
        "merged-kfac",
        "live-kfac",
        "live-xkfac",
        "recalling-xkfac",
    ],
)
def test_with_batch_norm_a_resumed_run_equals_an_uninterrupted_one(strategy: str, tmp_path: Path) -> None:
    options = {"tasks": 3, "budget": continual.Budget(steps=20, damping=0.1, balance="adaptive"), "threads": 1}
    with pytest.raises(KeyboardInterrupt):
        continual.compare("permuted-digits-bn", [strategy], out=tmp_path / "stopped", listener=Stops(2), **options)
    stopped = continual.compare("permuted-digits-bn", [strategy], out=tmp_path / "stopped", **options)
    whole = continual.compare("permuted-digits-bn", [strategy], out=tmp_path / "whole", **options)
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")
    assert stopped.runs[strategy][0]["adapted"] == whole.runs[strategy][0]["adapted"]
    folder = next((tmp_path / "whole" / "runs").iterdir())
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "result.json", "settings.json"]
    table = continual.summary(whole)
    assert table.columns[-2] == "own statistics [%]"
    assert "damping 0.1, balanced" in table.rows[0][1]


@pytest.mark.parametrize("balance", ["running", "gradients"])
def test_every_way_to_balance_resumes(balance: str, tmp_path: Path) -> None:
    options = {"tasks": 3, "budget": continual.Budget(steps=20, damping=0.1, balance=balance), "threads": 1}
    with pytest.raises(KeyboardInterrupt):
        continual.compare("permuted-digits-bn", ["merged-kfac"], out=tmp_path / "1", listener=Stops(2), **options)
    stopped = continual.compare("permuted-digits-bn", ["merged-kfac"], out=tmp_path / "1", **options)
    whole = continual.compare("permuted-digits-bn", ["merged-kfac"], out=tmp_path / "2", **options)
    assert rows_of(tmp_path / "1") == rows_of(tmp_path / "2")
    assert stopped.matrix("merged-kfac") == whole.matrix("merged-kfac")
    assert "damping 0.1, balanced by" in continual.summary(whole).rows[0][1]


@pytest.mark.parametrize("view", [views.FixedView(), views.MergedView()])
def test_batch_norm_is_fixed_from_the_second_task_on(view: views.View) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)).train()
    x, norm = torch.randn(50, 4) + 1, model[1]
    with view.learning(model, [x], later=False):
        assert norm.training
        model(x)
    before = copy.deepcopy(model).eval()
    with view.learning(model, [2 * x], later=True):
        assert not norm.training
        torch.testing.assert_close(model(x), before(x), rtol=1e-5, atol=1e-5)  # the function is kept
        moved = not torch.allclose(norm.running_var, before[1].running_var)
        assert moved == isinstance(view, views.MergedView)
        live = continual_base.live_parameters(view.live(model))
        assert ("1.weight" in live) == isinstance(view, views.FixedView)
    subject = view.subject(model)
    torch.testing.assert_close(subject(x), before(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("coupled", [False, True])
def test_live_batch_norm_stays_in_train_mode_and_ends_with_the_statistics_of_its_weights(coupled: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)).train()
    view, batches = views.LiveView(coupled), [torch.randn(50, 4) + 1, torch.randn(50, 4)]
    for later in (False, True):
        with view.learning(model, batches, later):
            assert model[1].training
            model(2 * batches[0])
            with torch.no_grad():
                model[0].weight.add_(1.0)
            live = continual_base.live_parameters(view.live(model))
            assert ("1.weight" in live) == (not later)
        means = torch.stack([model[0](x).mean(0) for x in batches]).mean(0)
        torch.testing.assert_close(model[1].running_mean, means)
    subject = view.subject(model)
    assert subject.training == coupled
    x = batches[0]
    torch.testing.assert_close(subject(x), model(x) if coupled else model.eval()(x), rtol=1e-5, atol=1e-5)


def test_held_out_examples_are_not_trained_on() -> None:
    stream = continual.get_stream("permuted-digits-bn")
    (whole,), (task,) = stream.tasks(1, 0), stream.tasks(1, 0, held_out=100)
    assert whole.held_out is None
    assert len(task.train_inputs) == len(whole.train_inputs) - 100
    assert torch.equal(task.held_out.test_inputs, whole.train_inputs[-100:])
    assert torch.equal(task.held_out.test_targets, whole.train_targets[-100:])


def test_a_grid_gives_slack_for_a_stronger_penalty(tmp_path: Path) -> None:
    def point(strength: float, target: float, average: float) -> Point:
        settings = {"strength": strength, "damping": 0.0, "lr": 0.1, "balance": "none"}
        return Point("ewc", "none", settings, target, average)

    points = [point(1, 0.95, 0.6), point(10, 0.947, 0.8), point(100, 0.9, 0.9)]
    assert continual.Grid("s", tmp_path, points, slack=0.005).chosen("ewc", "none") is points[1]
    assert continual.Grid("s", tmp_path, points, slack=0.0).chosen("ewc", "none") is points[0]
    near = [point(1, 0.1, 0.6), point(10, 0.09, 0.8)]  # 0.1 - 0.01 is above 0.09
    assert continual.Grid("s", tmp_path, near, slack=0.01).chosen("ewc", "none") is near[1]
    assert correlation(points) == pytest.approx(-0.78987, abs=1e-4)
    assert math.isnan(correlation(points[:1]))
    (row,) = choices(continual.Grid("s", tmp_path, points)).rows
    assert row[2:] == ["94.7", "80.0", "90.0", "-0.79"]


def test_a_grid_weighs_penalties_as_the_budget_says(tmp_path: Path) -> None:
    budget, axes = continual.Budget(steps=2, held_out=100, balance="adaptive"), {"strength": [1.0]}
    grid = continual.search("permuted-digits", ["l2"], axes, out=tmp_path, tasks=2, budget=budget, threads=1)
    assert [point.balance for point in grid.points] == ["adaptive"]
    with pytest.raises(ExperimentError, match="not balance='adaptive' beside them"):
        continual.search("permuted-digits", ["l2"], axes, out=tmp_path, balances=["none"], tasks=2, budget=budget)


def test_a_squared_distance_has_damping_and_stands_for_all_tasks_learned() -> None:
    model, task_loss = torch.nn.Linear(3, 2), torch.tensor(1.0)
    memory = get_strategy("l2").make(Options(2.0, 0.5, "none"))
    memory.remember(model, None, 0)  # type: ignore[arg-type]
    with torch.no_grad():
        model.weight.add_(1.0)
    with memory.learning(model, [], 3):
        total, value = memory.loss(task_loss, model)
    torch.testing.assert_close(value.item(), 0.5 * 2.0 * (1 + 0.5) * 6)  # of C + damping I, C being I
    torch.testing.assert_close(total.item(), 1.0 + value.item())
    memory.options = Options(2.0, 0.0, "adaptive")  # type: ignore[attr-defined]
    memory._damping = None  # type: ignore[attr-defined]
    with memory.learning(model, [], 3):
        total, _ = memory.loss(task_loss, model)
    torch.testing.assert_close(total.item(), 6.0 * 1.0 / 4 + 6.0 * 3 / 4)  # the smaller one is raised to the larger


def test_finished_runs_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = continual.compare("permuted-digits", ["finetune"], out=tmp_path, **SMALL)
    again = continual.compare("permuted-digits", ["finetune", "l2"], out=tmp_path, **SMALL)
    assert again.runs["finetune"] == first.runs["finetune"]
    learned = []
    original = runner._learn
    monkeypatch.setattr(runner, "_learn", lambda *a: learned.append(1) or original(*a))
    continual.compare("permuted-digits", ["finetune", "l2"], out=tmp_path, **SMALL)
    assert not learned
    continual.compare("permuted-digits", ["l2"], out=tmp_path, fresh=True, **SMALL)
    assert len(learned) == 3


def test_a_damaged_penalty_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        continual.compare("permuted-digits", ["ewc"], out=tmp_path, listener=Stops(1), **SMALL)
    next(tmp_path.glob("runs/*/penalty-1.safetensors")).write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="delete the run's folder"):
        continual.compare("permuted-digits", ["ewc"], out=tmp_path, **SMALL)


@pytest.mark.parametrize(
    ("stream", "strategy", "held_out"), [("permuted-digits-bn", "online-kfac", 99), ("permuted-digits", "kkfac", 499)]
)
def test_a_last_batch_of_one_example_is_left_out(stream: str, strategy: str, held_out: int, tmp_path: Path) -> None:
    budget = continual.Budget(steps=5, held_out=held_out)  # of 1500
    assert continual.compare(stream, [strategy], out=tmp_path, tasks=2, budget=budget, threads=1).done == [strategy]


def test_what_couples_layers_refuses_convolutions_by_name(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"kkfac on split-digits-cnn: .* does not take Conv2d '0', Conv2d '3'"):
        continual.compare(
            "split-digits-cnn", ["kkfac"], out=tmp_path, tasks=2, budget=continual.Budget(steps=2), threads=1
        )


def test_seeds_and_tasks_with_outputs_of_their_own(tmp_path: Path) -> None:
    results = continual.compare(
        "split-digits-cnn", ["kfac"], out=tmp_path, tasks=2, budget=continual.Budget(epochs=1), seeds=(0, 1), threads=1
    )
    assert len(results.runs["kfac"]) == 2
    assert results.runs["kfac"][0]["tasks"] != results.runs["kfac"][1]["tasks"]
    table = continual.summary(results)
    assert "±" in table.rows[0][2]


def test_an_approximation_whose_penalty_cannot_be_saved_is_no_strategy(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="kfac_tridiagonal is no strategy: its penalty"):
        continual.compare("permuted-digits", ["finetune", "kfac_tridiagonal"], out=tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ExperimentError, match="unknown strategy 'nope'") as error:
        continual.compare("permuted-digits", ["nope"], out=tmp_path / "out", **SMALL)
    assert "tekfac" in str(error.value)
    assert "kfac_tridiagonal" not in str(error.value)


def test_divergence_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="l2 on permuted-digits, seed 0, diverged at step"):
        continual.compare(
            "permuted-digits",
            ["l2"],
            out=tmp_path,
            settings={"l2": {"strength": 1e38, "lr": 1e3}},
            tasks=2,
            budget=continual.Budget(epochs=5),
            threads=1,
        )
