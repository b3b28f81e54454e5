"""Read a folder of runs back: what was planned, what was done, and which point of a grid was best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kronfac.experiments.errors import CheckpointError, ExperimentError, UnknownNameError
from kronfac.experiments.files import read_json
from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.plan import Plan
from kronfac.experiments.problems import get_problem
from kronfac.experiments.records import read_records
from kronfac.experiments.runner import METRICS, RESULT, read_result
from kronfac.experiments.search import near_an_end
from kronfac.experiments.settings import RunSettings, check_settings

COMPARISON, RUN_FOLDERS = "comparison.json", "runs"


@dataclass(frozen=True)
class RunResult:
    """One run as far as it has come.

    Attributes:
        settings: Its settings.
        status: ``"done"``, ``"diverged"`` or ``"unfinished"``.
        note: What there is to say about it, or nothing.
        evaluations: The lines of its metrics that hold an evaluation.
        threads: The numbers of torch threads that trained it, one after the other; empty where nobody noted them.
    """

    settings: RunSettings
    status: str
    note: str
    evaluations: list[dict[str, float]]
    threads: tuple[int, ...] = ()

    def final(self, metric: str) -> float:
        """Give the last value of a metric.

        Args:
            metric: Its name.

        Returns:
            The value; infinity for a run that diverged or has not been evaluated.
        """
        if self.status == "diverged" or not self.evaluations:
            return math.inf
        return self.evaluations[-1][metric]


@dataclass(frozen=True)
class GridPoint:
    """One point of a grid.

    Attributes:
        varied: The hyper-parameters of the grid, with their values here.
        values: All hyper-parameters.
        result: Its run.
    """

    varied: dict[str, object]
    values: dict[str, object]
    result: RunResult


@dataclass(frozen=True)
class Results:
    """All there is in a folder.

    Attributes:
        folder: The folder.
        plan: What was planned.
        environment: On what it was run.
        command: How it was asked for.
        grids: The points of each tuned optimiser's grid.
        chosen: The hyper-parameters of the final runs, for each optimiser whose grid is finished.
        runs: The final runs.
    """

    folder: Path
    plan: Plan
    environment: dict[str, object]
    command: str
    grids: dict[str, list[GridPoint]]
    chosen: dict[str, dict[str, object]]
    runs: list[RunResult]

    def of(self, optimizer: str) -> list[RunResult]:
        """Give the final runs of an optimiser.

        Args:
            optimizer: Its name.

        Returns:
            One run per seed.
        """
        return [run for run in self.runs if run.settings.optimizer == optimizer]


def run_folder(folder: Path, settings: RunSettings) -> Path:
    """Name the folder of a run inside that of its comparison.

    Args:
        folder: The comparison's folder.
        settings: The run's settings.

    Returns:
        The path.
    """
    return folder / RUN_FOLDERS / settings.folder_name


def read_run(folder: Path, settings: RunSettings) -> RunResult:
    """Read a run, finished or not.

    Args:
        folder: The comparison's folder.
        settings: The run's settings.

    Returns:
        The run.

    Raises:
        CheckpointError: If its metrics are not those that a run writes.
    """
    path = run_folder(folder, settings)
    names = get_problem(settings.problem).metrics
    evaluations = [record for record in read_records(path / METRICS) if not record.keys().isdisjoint(names)]
    wrong = _damage(evaluations, names)
    if not (path / RESULT).exists():
        result: dict[str, object] = {"status": "unfinished", "note": ""}
    else:
        result = read_result(path / RESULT)
        if result["status"] == "done" and not wrong and (not evaluations or evaluations[-1]["step"] != result["step"]):
            wrong = f"no evaluation at step {result['step']}, at which the run ended"
    if wrong:
        raise CheckpointError(f"{path / METRICS} is damaged: {wrong}; delete its folder to start the run anew")
    threads: tuple[int, ...] = tuple(result.get("threads", ()))  # type: ignore[arg-type]
    return RunResult(settings, str(result["status"]), str(result["note"] or ""), evaluations, threads)


def _damage(evaluations: Sequence[Mapping[str, object]], metrics: Sequence[str]) -> str:
    """Say what is wrong with evaluations, of which tables and pictures need every number; nothing if they are whole."""
    before = -1.0
    for record in evaluations:
        for name in ("step", "epoch", "seconds", *metrics):
            value = record.get(name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                return f"an evaluation has no number {name}"
        if float(record["step"]) <= before:  # type: ignore[arg-type]
            return f"step {record['step']} comes after step {before:g}"
        before = float(record["step"])  # type: ignore[arg-type]
    return ""


def best_point(points: list[GridPoint], metric: str) -> GridPoint | None:
    """Choose from a finished grid.

    Args:
        points: The points.
        metric: The figure to minimise at the end of the runs.

    Returns:
        The best point; None while a run is unfinished, or if all diverged.
    """
    if any(point.result.status == "unfinished" for point in points):
        return None
    best = min(points, key=lambda point: point.result.final(metric))
    return best if math.isfinite(best.result.final(metric)) else None


def at_edge(plan: Plan, optimizer: str, point: GridPoint) -> list[str]:
    """Say where the best point touches the rim of its grid: there, a wider grid might hold a better one.

    Args:
        plan: The plan.
        optimizer: The optimiser's name.
        point: The best point.

    Returns:
        The names of such hyper-parameters; those with fewer than three numbers to choose from do not count.
    """
    names = []
    if optimizer in plan.tried:
        ends = {name: values for name, values in plan.grid[optimizer].items() if None not in map(_number, values)}
        return [name for name, pair in ends.items() if len(pair) == 2 and near_an_end(pair, point.varied[name])]
    for name, values in plan.grid[optimizer].items():
        numbers = [number for value in values if (number := _number(value)) is not None]
        if len(numbers) > 2 and _number(point.varied[name]) in (min(numbers), max(numbers)):
            names.append(name)
    return names


def _number(value: object) -> float | None:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def grid_points(plan: Plan, folder: Path, optimizer: str) -> list[GridPoint]:
    """Read the grid of an optimiser.

    Args:
        plan: The plan.
        folder: The comparison's folder.
        optimizer: The optimiser's name.

    Returns:
        Its points with what there is of their runs.
    """
    return [
        GridPoint(
            varied={name: values[name] for name in plan.grid[optimizer]},
            values=values,
            result=read_run(folder, plan.settings(optimizer, values, plan.seeds[0], tuning=True)),
        )
        for values in plan.points(optimizer)
    ]


def read_results(folder: Path) -> Results:
    """Read what `kronfac.experiments.compare` left in a folder.

    Args:
        folder: The folder.

    Returns:
        The results so far.

    Raises:
        ExperimentError: If the folder holds no comparison, or its files are damaged.
    """
    path = folder / COMPARISON
    if not path.is_file():
        raise ExperimentError(f"{folder} holds no runs of kronfac: there is no file {path}")
    content = read_json(path)
    try:
        plan = Plan.from_json(content.get("plan"))
        _check_names(plan)
        _check_values(plan)
    except ExperimentError as error:
        raise ExperimentError(f"{path}: {error}; delete it to start anew") from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:  # where it was edited, anything may be anywhere
        raise ExperimentError(f"{path} holds no plan of a comparison; delete it to start anew") from error
    grids, chosen, runs = {}, {}, []
    for optimizer in plan.optimizers:
        values = dict(plan.hyperparameters[optimizer])
        if plan.grid.get(optimizer):
            grids[optimizer] = grid_points(plan, folder, optimizer)
            best = best_point(grids[optimizer], plan.metric)
            if best is None:
                continue
            values = best.values
        chosen[optimizer] = values
        runs += [read_run(folder, plan.settings(optimizer, values, seed)) for seed in plan.seeds]
    environment = content.get("environment")
    return Results(
        folder=folder,
        plan=plan,
        environment=environment if isinstance(environment, dict) else {},
        command=str(content.get("command", "")),
        grids=grids,
        chosen=chosen,
        runs=runs,
    )


def _check_values(plan: Plan) -> None:
    """Refuse a plan that this package did not write."""
    for name in plan.optimizers:
        values = get_optimizer(name).resolve(plan.hyperparameters[name])
        for seed in plan.seeds:
            check_settings(plan.settings(name, values, seed, tuning=True))
        plan.points(name)
    for what, value in (("threads", plan.threads), ("examples", plan.examples)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ExperimentError(f"{what} must be a whole number of at least 1, got {value!r}")
    for target in plan.targets:
        if isinstance(target, bool) or not isinstance(target, (int, float)) or not math.isfinite(target):
            raise ExperimentError(f"targets must be finite numbers, got {target!r}")


def _check_names(plan: Plan) -> None:
    """Refuse a plan of a version that has other problems, optimisers or metrics."""
    metrics = get_problem(plan.problem).metrics
    if plan.metric not in metrics:
        raise UnknownNameError(f"metric of {plan.problem}", plan.metric, metrics)
    for name in plan.optimizers:
        get_optimizer(name)
        if name not in plan.hyperparameters:
            raise ExperimentError(f"the plan has no hyper-parameters of {name}")
