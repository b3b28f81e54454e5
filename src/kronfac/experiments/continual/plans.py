"""What is asked for, checked, as runs; and the runs carried out in one folder."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kronfac.experiments.continual.balances import BALANCES
from kronfac.experiments.continual.results import Failure
from kronfac.experiments.continual.runner import Listener, Plan, RunError, finished, run
from kronfac.experiments.continual.strategies import UNSAVED, Strategy, get_strategy
from kronfac.experiments.continual.streams import Stream, get_stream
from kronfac.experiments.datasets import load
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.files import make_folder
from kronfac.experiments.lock import locked
from kronfac.experiments.settings import MAX_SEED

SETTINGS = ("strength", "lr", "damping", "balance")
#: Runs that were done, with their results.
Done = list[tuple[Plan, dict[str, object]]]
#: Takes a folder, the runs in it that were done and those that failed, and writes them down.
Keep = Callable[[Path, Done, list[Failure]], object]


@dataclass(frozen=True)
class Budget:
    """What all strategies have in common.

    Attributes:
        epochs: Passes through each task's data; None for the stream's.
        steps: Batches of each task, instead of epochs.
        lr: Learning rate of Adam, where a strategy has none of its own; None for the stream's.
        damping: Added to a penalty's curvature, likewise.
        balance: How a penalty is weighed, likewise.
        held_out: Training examples of each task held out for the target accuracy.
    """

    epochs: int | None = None
    steps: int | None = None
    lr: float | None = None
    damping: float = 0.0
    balance: str = "none"
    held_out: int = 0


def plans_of(
    stream: str,
    strategies: Sequence[str],
    tasks: int,
    seeds: Sequence[int],
    budget: Budget,
    settings: Mapping[str, Mapping[str, object]],
) -> list[Plan]:
    """Check what is asked for and make runs of it.

    Args:
        stream: Name of the stream.
        strategies: Names of the strategies.
        tasks: Number of tasks.
        seeds: One run of each strategy for each.
        budget: What all strategies have in common.
        settings: What differs, by strategy.

    Returns:
        The runs, strategy by strategy.

    Raises:
        ExperimentError: If anything is unknown or out of range.
    """
    found = get_stream(stream)
    check_names(strategies)
    chosen = {name: get_strategy(name) for name in strategies}
    if refused := [name for name in chosen if name in UNSAVED]:
        raise ExperimentError(
            f"{refused[0]} is no strategy: its penalty, which couples layers, cannot be saved, so that a run that was "
            "stopped could not go on"
        )
    for name, values in settings.items():
        if name not in chosen:
            raise ExperimentError(f"a setting was given for {name!r}, which is not among the strategies")
        if stray := [key for key in values if key not in SETTINGS]:
            raise ExperimentError(f"{name} has no setting {stray[0]!r}; known: {', '.join(SETTINGS)}")
    if not seeds or len(set(seeds)) < len(seeds) or any(not 0 <= seed <= MAX_SEED for seed in seeds):
        raise ExperimentError(
            f"seeds must be different whole numbers of at least 0 and at most {MAX_SEED}, got {list(seeds)}"
        )
    if budget.held_out < 0:
        raise ExperimentError(f"held-out examples must be at least 0, got {budget.held_out}")
    steps = _steps(found, tasks, seeds[0], budget)
    return [
        Plan(
            stream=stream,
            strategy=name,
            tasks=tasks,
            steps=steps,
            held_out=budget.held_out,
            batch_size=found.batch_size,
            seed=seed,
            **_checked(found, strategy, budget, settings.get(name, {})),  # type: ignore[arg-type]
        )
        for name, strategy in chosen.items()
        for seed in seeds
    ]


def check_names(strategies: Sequence[str]) -> None:
    """Refuse strategies that are none, or given twice.

    Args:
        strategies: Their names.

    Raises:
        ExperimentError: If they are.
    """
    if not strategies or len(set(strategies)) < len(strategies):
        raise ExperimentError(
            f"strategies must be different names, at least one, got {', '.join(strategies) or 'none'}"
        )


def carry_out(
    plans: Sequence[Plan],
    out: str | Path,
    keep: Keep,
    fresh: bool = False,
    threads: int | None = None,
    listener: Listener | None = None,
) -> tuple[Path, Done, list[Failure]]:
    """Run, or read the results of runs that are done. A run that fails does not keep the others from being run.

    Args:
        plans: The runs, on one stream.
        out: The folder.
        keep: Called before the first run and after each, so that there is a report of what was stopped.
        fresh: Throw away what these runs did before.
        threads: Torch threads.
        listener: Hears how it goes.

    Returns:
        The folder, the runs that were done with their results, and those that failed.

    Raises:
        ExperimentError: If the folder is in use, a checkpoint is damaged, or all runs fail.
    """
    listener = listener or Listener()
    if threads is not None and threads < 1:
        raise ExperimentError(f"threads must be at least 1, got {threads}")
    folder = make_folder(Path(out))
    before = torch.get_num_threads()
    failures: list[Failure] = []
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        with locked(folder):
            listener.plan(len(plans), plans[0].tasks)
            places = {plan: folder / "runs" / plan.folder_name for plan in plans}
            known = {} if fresh else {plan: result for plan, at in places.items() if (result := finished(at))}
            keep(folder, _in_order(plans, known), failures)
            for plan in plans:
                new = plan not in known
                if fresh:
                    shutil.rmtree(places[plan], ignore_errors=True)
                try:
                    known[plan] = run(plan, places[plan], listener)
                except RunError as error:
                    failures.append(Failure(asdict(plan), str(error)))
                    listener.failed(plan, str(error))
                if new:
                    keep(folder, _in_order(plans, known), failures)
    finally:
        torch.set_num_threads(before)
    done = _in_order(plans, known)
    if not done:
        others = f" (all {len(failures)} runs failed; this is the first)" if failures[1:] else ""
        raise ExperimentError(failures[0].reason + others)
    return folder, done, failures


def _in_order(plans: Sequence[Plan], known: Mapping[Plan, dict[str, object]]) -> Done:
    return [(plan, known[plan]) for plan in plans if plan in known]


def call_of(function: str, stream: str, strategies: Sequence[str], given: Mapping[str, object], out: str | Path) -> str:
    """Write down how a function of this package was called.

    Args:
        function: Its name.
        stream: Name of the stream.
        strategies: Names of the strategies.
        given: Further arguments; those that are None are left out.
        out: The folder.

    Returns:
        Python.
    """
    shown = {**{name: value for name, value in given.items() if value is not None}, "out": str(out)}
    words = ", ".join(f"{name}={value!r}" for name, value in shown.items())
    return f"continual.{function}({stream!r}, {list(strategies)!r}, {words})"


def _steps(stream: Stream, tasks: int, seed: int, budget: Budget) -> int:
    """Batches of a task; looks at the data, so that those that are not there are named before a folder is made."""
    if budget.steps is not None and budget.epochs is not None:
        raise ExperimentError("give steps or epochs, not both")
    for name, value in (("epochs", budget.epochs), ("steps", budget.steps)):
        if value is not None and value < 1:
            raise ExperimentError(f"{name} must be at least 1, got {value}")
    stream.check(tasks)
    data = load(stream.dataset)
    size = len(data.train.labels) // (tasks if stream.kind == "split" else 1) - budget.held_out
    if size < stream.batch_size:
        raise ExperimentError(
            f"{budget.held_out} held-out examples leave {max(size, 0)} of a task's, less than a batch of "
            f"{stream.batch_size}"
        )
    if budget.steps is not None:
        return budget.steps
    return (stream.epochs if budget.epochs is None else budget.epochs) * (size // stream.batch_size)


def _checked(
    stream: Stream, strategy: Strategy, budget: Budget, settings: Mapping[str, object]
) -> dict[str, float | str]:
    if strategy.strength is None and (stray := [key for key in settings if key != "lr"]):
        raise ExperimentError(f"{strategy.name} has no {stray[0]}")
    name = strategy.name
    common = stream.lr if budget.lr is None else budget.lr
    lr = _number(f"{name}.lr" if "lr" in settings else "lr", settings.get("lr", common))
    if lr <= 0:
        raise ExperimentError(f"lr must be a number above 0, got {lr:g}")
    damping = _number(
        f"{name}.damping" if "damping" in settings else "damping", settings.get("damping", budget.damping)
    )
    if damping < 0:
        raise ExperimentError(f"damping must be a number of at least 0, got {damping:g}")
    balance = settings.get("balance", budget.balance)
    if balance not in BALANCES:
        raise ExperimentError(f"balance must be one of {', '.join(BALANCES)}, got {balance!r}")
    if strategy.strength is None:
        return {"strength": 0.0, "lr": lr, "damping": 0.0, "balance": "none"}
    return {
        "strength": strategy.checked(settings.get("strength")),
        "lr": lr,
        "damping": damping,
        "balance": str(balance),
    }


def _number(name: str, value: object) -> float:
    try:
        found = float(str(value))
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ExperimentError(f"{name} must be a number, got {value!r}")
    return found
