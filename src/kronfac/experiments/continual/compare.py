"""Several strategies on one stream: runs, tables and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kronfac.experiments.continual.metrics import Metrics, metrics_of
from kronfac.experiments.continual.plans import Budget, carry_out, plans_of
from kronfac.experiments.continual.runner import Listener
from kronfac.experiments.continual.strategies import get_strategy
from kronfac.experiments.errors import need
from kronfac.experiments.files import without_nan, write_text
from kronfac.experiments.pictures import save_figure
from kronfac.experiments.present import Table, number

PICTURE, LINES = "accuracy-matrices.png", "results.jsonl"


@dataclass(frozen=True)
class Results:
    """What a comparison of strategies found.

    Attributes:
        stream: Name of the stream.
        tasks: Number of tasks.
        folder: Where its files are.
        strategies: Names, in order.
        runs: For each strategy, the ``result.json`` of each seed.
    """

    stream: str
    tasks: int
    folder: Path
    strategies: list[str]
    runs: dict[str, list[dict[str, object]]]

    def matrix(self, strategy: str) -> list[list[float]]:
        """Mean accuracy matrix over seeds.

        Args:
            strategy: The strategy's name.

        Returns:
            Row i: accuracy on each task after task i.
        """
        found = torch.tensor([run["matrix"] for run in self.runs[strategy]], dtype=torch.float64)
        return found.mean(0).tolist()

    def metrics(self, strategy: str) -> list[Metrics]:
        """Figures of each seed.

        Args:
            strategy: The strategy's name.

        Returns:
            One for each run.
        """
        return [metrics_of(run["initial"], run["matrix"]) for run in self.runs[strategy]]  # type: ignore[arg-type]


def compare(
    stream: str,
    strategies: Sequence[str],
    *,
    out: str | Path,
    tasks: int = 5,
    seeds: Sequence[int] = (0,),
    budget: Budget | None = None,
    settings: Mapping[str, Mapping[str, object]] | None = None,
    fresh: bool = False,
    threads: int | None = None,
    listener: Listener | None = None,
) -> Results:
    """Learn a stream of tasks with several strategies, from the same weights and in the same order.

    Args:
        stream: Name of the stream.
        strategies: Names of the strategies.
        out: Folder for runs, ``results.jsonl`` and the picture of the accuracy matrices.
        tasks: Number of tasks.
        seeds: Each decides tasks, weights, batches and sampled labels of one run.
        budget: What all strategies have in common; the stream's by default.
        settings: What differs, by strategy: ``strength``, ``lr``, ``damping``, ``balance``.
        fresh: Throw away what these runs did before.
        threads: Torch threads.
        listener: Hears how it goes.

    Returns:
        What was found.

    Raises:
        ExperimentError: If anything given is unknown or out of range; before anything is written.
    """  # noqa: DOC502
    plans = plans_of(stream, strategies, tasks, seeds, budget or Budget(), settings or {})
    folder, found = carry_out(plans, out, fresh, threads, listener)
    runs: dict[str, list[dict[str, object]]] = {name: [] for name in strategies}
    for plan, result in zip(plans, found, strict=True):
        runs[plan.strategy].append(result)
    results = Results(stream, tasks, folder, list(strategies), runs)
    write_text(
        folder / LINES,
        "".join(
            json.dumps({**found, **without_nan(metrics._asdict())}, allow_nan=False) + "\n"
            for name in strategies
            for found, metrics in zip(runs[name], results.metrics(name), strict=True)
        ),
    )
    _draw(results)
    return results


def summary(results: Results) -> Table:
    """Show the figures, best average accuracy first.

    Args:
        results: The comparison.

    Returns:
        A row for each strategy: means over seeds in percent, with deviations where there are several. *Own statistics*
        is the average accuracy with those of the test batches in batch norm.
    """
    rows, normed = [], False
    for name in results.strategies:
        columns = list(zip(*results.metrics(name), strict=True))
        seconds = [float(run["seconds"]) for run in results.runs[name]]  # type: ignore[arg-type]
        settings = results.runs[name][0]["settings"]
        cells = [_percent(values) for values in columns]
        own: list[list[float]] = [run["adapted"] for run in results.runs[name]]  # type: ignore[misc]
        normed = own[0] is not None
        if normed:
            cells.append(_percent([sum(row) / len(row) for row in own]))
        order = -sum(columns[0])
        rows.append((order, [get_strategy(name).title, describe(settings), *cells, _seconds(seconds)]))
    rows.sort(key=lambda row: row[0])
    names = [field.replace("_", " ") + " [%]" for field in Metrics._fields]
    if normed:
        names.append("own statistics [%]")
    return Table(["strategy", "settings", *names, "seconds"], [cells for _, cells in rows])


def describe(settings: object) -> str:
    """Say what a run was weighed by.

    Args:
        settings: ``settings`` of its ``result.json``.

    Returns:
        One line; without what does not apply.
    """
    known: dict[str, object] = settings  # type: ignore[assignment]
    words = [f"lr {known['lr']:g}"]
    if known["strength"]:
        words += [f"{name} {known[name]:g}" for name in ("strength", "damping") if known[name]]
        words += ["balanced"] if known["balance"] == "adaptive" else []
    return ", ".join(words)


def _percent(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) < 2 or mean != mean:
        return number(100 * mean, ".1f")
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{100 * mean:.1f} ± {100 * deviation:.1f}"


def _seconds(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.1f}"


def _draw(results: Results) -> None:
    need("matplotlib", "experiments")
    from kronfac.plots import accuracy_matrices

    labels = [get_strategy(name).title for name in results.strategies]
    axes = accuracy_matrices(
        [results.matrix(name) for name in results.strategies], labels, title=f"{results.stream}, {results.tasks} tasks"
    )
    save_figure(axes[0], results.folder / PICTURE)
