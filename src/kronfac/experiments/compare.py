"""Several optimisers on one problem, under the same budget, resumable as a whole."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from kronfac.experiments.environment import environment, warning
from kronfac.experiments.errors import ExperimentError, need
from kronfac.experiments.files import make_folder, remove_leftovers, write_json
from kronfac.experiments.lock import locked
from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.plan import Grid, Plan, make_plan
from kronfac.experiments.problems import get_problem
from kronfac.experiments.progress import Progress
from kronfac.experiments.report import write_report
from kronfac.experiments.results import (
    COMPARISON,
    Results,
    at_edge,
    best_point,
    grid_points,
    read_results,
    run_folder,
)
from kronfac.experiments.runner import run
from kronfac.experiments.search import Search
from kronfac.experiments.searching import searching, try_points
from kronfac.experiments.settings import RunSettings


def compare(
    problem: str,
    optimizers: Sequence[str] = ("sgd", "adam", "kfac"),
    *,
    out: str | Path,
    steps: int | None = None,
    epochs: float | None = None,
    seconds: float | None = None,
    seeds: Sequence[int] = (0,),
    hyperparameters: Mapping[str, Mapping[str, object]] | None = None,
    grid: Grid | None = None,
    grid_steps: int | None = None,
    search: Search | None = None,
    metric: str | None = None,
    evaluate_every: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    targets: Sequence[float] = (),
    progress: Progress | None = None,
    checkpoint_every: float = 5.0,
    command: str | None = None,
    fresh: bool = False,
) -> Results:
    """Train a problem with several optimisers and write table, pictures and report.

    Called again with the same arguments, after an interruption of any kind, it goes on where it was; finished runs
    are not repeated, so that optimisers and seeds can be added later. Runs with other settings live beside each
    other in the folder; the report shows those of the last call.

    Args:
        problem: Name of a problem, see `kronfac.experiments.PROBLEMS`.
        optimizers: Names of optimisers, see `kronfac.experiments.OPTIMIZERS`.
        out: The folder for runs, pictures and report.
        steps: Budget in steps; the problem's default if no budget is given at all.
        epochs: Budget in passes through the training set.
        seconds: Budget in training seconds, evaluation excluded. Of several budgets the first spent ends a run.
        seeds: One run of each optimiser per seed.
        hyperparameters: Values that replace the problem's tuned ones: ``{"kfac": {"damping": 0.1}}``.
        grid: Values to tune over before the final runs: ``{"sgd": {"lr": [0.01, 0.03, 0.1]}}``. Every combination is
            run with the first seed; the one with the lowest final ``metric`` wins. The whole grid is in the report.
        grid_steps: Budget in steps of a tuning run; the whole budget by default.
        search: Trials in place of a grid, as many for each optimiser: the next point is chosen by what came of those
            before, and the best is used. Stopped, it goes on with the same points.
        metric: The figure that is tuned and compared, lower being better; the problem's by default.
        evaluate_every: Steps between evaluations; the problem's by default.
        device: Torch device.
        threads: Torch threads; those in use by default.
        targets: Values of the metric; the report says in how many steps and seconds each optimiser reaches them.
        progress: Hears how it goes.
        checkpoint_every: Seconds between checkpoints.
        command: How this was asked for, to be printed in the report; the Python call by default.
        fresh: Whether runs of this comparison that are already in the folder are thrown away first.

    Returns:
        The results, as `kronfac.experiments.read_results` reads them.

    Raises:
        ExperimentError: If an argument or a file is unusable; the message names it.
        KeyboardInterrupt: On Ctrl-C or SIGTERM, after a checkpoint.
    """  # noqa: DOC502
    task, progress = get_problem(problem), progress or Progress()
    arguments = {
        "steps": steps,
        "epochs": epochs,
        "seconds": seconds,
        "seeds": seeds,
        "hyperparameters": hyperparameters,
        "grid": grid,
        "grid_steps": grid_steps,
        "metric": metric,
        "evaluate_every": evaluate_every,
        "device": device,
        "threads": threads,
        "targets": targets,
    }
    for module in (
        "pandas",
        "matplotlib",
        "plotly",
    ):  # for the report: missing ones are better known now than at the end
        need(module, "experiments")
    # Checked before the data are loaded (which may be a download) and before anything is written.
    checked = make_plan(task, optimizers, examples=task.batch_size, **arguments)  # type: ignore[arg-type]
    if grid_steps is not None and not grid and search is None:
        raise ExperimentError(f"grid_steps={grid_steps} is the budget of a grid's runs, and there is no grid")
    if search is not None:
        need("optuna", "sweep")
        searching(checked, search)
    for library in (get_optimizer(name).library for name in optimizers):
        if library is not None:
            need(*library)
    folder = make_folder(Path(out))
    data = task.data()
    plan = make_plan(task, optimizers, examples=len(data.train_inputs), **arguments)  # type: ignore[arg-type]
    plan = plan if search is None else searching(plan, search)
    plan.check_batches()
    call = command or _call(problem, optimizers, out, arguments)
    with locked(folder), _threads(plan.threads):
        remove_leftovers(folder)
        found = environment() | {"threads": plan.threads}

        def note(plan: Plan) -> None:
            write_json(folder / COMPARISON, {"plan": plan.as_json(), "environment": found, "command": call})

        note(plan)
        if busy := warning(found):
            progress.message(busy)
        data = data.to(device)

        def train(settings: RunSettings) -> None:
            run(task, settings, data, run_folder(folder, settings), progress, checkpoint_every)

        do = _anew(folder, train) if fresh else train
        if search is not None:
            progress.plan(len(plan.optimizers) * (search.trials + len(plan.seeds)))
            for name in plan.optimizers:
                plan = try_points(plan, search, name, folder, note, do)
        _execute(plan, folder, progress, do)
        results = read_results(folder)
        write_report(results)
    return results


def _anew(folder: Path, train: Callable[[RunSettings], None]) -> Callable[[RunSettings], None]:
    """Remove each run's folder before its first training in this call (a grid's winner may be asked for twice)."""
    begun: set[str] = set()

    def train_anew(settings: RunSettings) -> None:
        if settings.folder_name not in begun:
            shutil.rmtree(run_folder(folder, settings), ignore_errors=True)
            begun.add(settings.folder_name)
        train(settings)

    return train_anew


def _execute(plan: Plan, folder: Path, progress: Progress, train: Callable[[RunSettings], None]) -> None:
    points = {name: plan.points(name) for name in plan.optimizers}
    if not plan.tried:
        progress.plan(sum(map(len, points.values())) + len(plan.optimizers) * len(plan.seeds))
    chosen = {name: dict(plan.hyperparameters[name]) for name in plan.optimizers}
    for name in [name for name in plan.optimizers if points[name]]:
        for values in () if name in plan.tried else points[name]:
            train(plan.settings(name, values, plan.seeds[0], tuning=True))
        best = best_point(grid_points(plan, folder, name), plan.metric)
        if best is None:
            progress.message(f"{name}: every point of the grid diverged; it takes no further part")
            del chosen[name]
            continue
        chosen[name] = best.values
        varied = ", ".join(f"{key}={value}" for key, value in best.varied.items())
        progress.message(f"{name}: best of {len(points[name])} points is {varied}")
        for key in at_edge(plan, name, best):
            progress.message(f"{name}: {key}={best.varied[key]} is at the edge of what was tried; more may do better")
    # Seeds outside, optimisers inside: a machine that slows down half-way slows all optimisers alike.
    for seed in plan.seeds:
        for name, values in chosen.items():
            train(plan.settings(name, values, seed))


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _call(problem: str, optimizers: Sequence[str], out: str | Path, arguments: Mapping[str, object]) -> str:
    given = {"out": str(out), **{name: value for name, value in arguments.items() if value not in (None, ())}}
    return f"compare({problem!r}, {list(optimizers)!r}, {', '.join(f'{k}={v!r}' for k, v in given.items())})"
