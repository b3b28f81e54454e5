"""Several strategies on one stream: runs, tables and pictures."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kronfac.experiments.continual.metrics import Metrics, metrics_of
from kronfac.experiments.continual.runner import Listener, Plan, run
from kronfac.experiments.continual.strategies import get_strategy
from kronfac.experiments.continual.streams import get_stream
from kronfac.experiments.errors import ExperimentError, need
from kronfac.experiments.files import make_folder, replace_atomically, write_text
from kronfac.experiments.lock import locked
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
    epochs: int | None = None,
    lr: float | None = None,
    strengths: Mapping[str, object] | None = None,
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
        epochs: Passes through each task's data; the stream's by default.
        lr: Learning rate of Adam; the stream's by default.
        strengths: Strengths by strategy; the strategies' own by default.
        fresh: Throw away what these runs did before.
        threads: Torch threads.
        listener: Hears how it goes.

    Returns:
        What was found.

    Raises:
        ExperimentError: If anything given is unknown or out of range; before anything is written.
    """
    listener = listener or Listener()
    plans = _plans(stream, strategies, tasks, seeds, epochs, lr, strengths or {})
    if threads is not None and threads < 1:
        raise ExperimentError(f"threads must be at least 1, got {threads}")
    get_stream(stream).tasks(tasks, seeds[0])  # data that are not there are named before a folder is made
    folder = make_folder(Path(out))
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        with locked(folder):
            listener.plan(len(plans), tasks)
            runs: dict[str, list[dict[str, object]]] = {name: [] for name in strategies}
            for plan in plans:
                place = folder / "runs" / plan.folder_name
                if fresh:
                    shutil.rmtree(place, ignore_errors=True)
                runs[plan.strategy].append(run(plan, place, listener))
    finally:
        torch.set_num_threads(before)
    results = Results(stream, tasks, folder, list(strategies), runs)
    write_text(
        folder / LINES,
        "".join(
            json.dumps({**found, **_finite(metrics)}, allow_nan=False) + "\n"
            for name in strategies
            for found, metrics in zip(runs[name], results.metrics(name), strict=True)
        ),
    )
    _draw(results)
    return results


def _plans(
    stream: str,
    strategies: Sequence[str],
    tasks: int,
    seeds: Sequence[int],
    epochs: int | None,
    lr: float | None,
    strengths: Mapping[str, object],
) -> list[Plan]:
    found = get_stream(stream)
    if not strategies or len(set(strategies)) < len(strategies):
        raise ExperimentError(
            f"strategies must be different names, at least one, got {', '.join(strategies) or 'none'}"
        )
    chosen = {name: get_strategy(name) for name in strategies}
    if stray := [name for name in strengths if name not in chosen]:
        raise ExperimentError(f"a strength was given for {stray[0]!r}, which is not among the strategies")
    if not seeds or len(set(seeds)) < len(seeds) or any(seed < 0 for seed in seeds):
        raise ExperimentError(f"seeds must be different whole numbers of at least 0, got {list(seeds)}")
    epochs, lr = found.epochs if epochs is None else epochs, found.lr if lr is None else lr
    if epochs < 1:
        raise ExperimentError(f"epochs must be at least 1, got {epochs}")
    if not (math.isfinite(lr) and lr > 0):
        raise ExperimentError(f"lr must be a number above 0, got {lr}")
    return [
        Plan(stream, name, strategy.checked(strengths.get(name)), tasks, epochs, lr, found.batch_size, seed)
        for name, strategy in chosen.items()
        for seed in seeds
    ]


def summary(results: Results) -> Table:
    """Show the figures, best average accuracy first.

    Args:
        results: The comparison.

    Returns:
        A row for each strategy: means over seeds in percent, with deviations where there are several.
    """
    rows = []
    for name in results.strategies:
        columns = list(zip(*results.metrics(name), strict=True))
        seconds = [float(run["seconds"]) for run in results.runs[name]]  # type: ignore[arg-type]
        strength = results.runs[name][0]["settings"]["strength"]  # type: ignore[index]
        cells = [_percent(values) for values in columns]
        order = -sum(columns[0])
        rows.append((order, [get_strategy(name).title, number(strength or math.nan, "g"), *cells, _seconds(seconds)]))
    rows.sort(key=lambda row: row[0])
    names = [field.replace("_", " ") + " [%]" for field in Metrics._fields]
    return Table(["strategy", "strength", *names, "seconds"], [cells for _, cells in rows])


def _percent(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) < 2 or mean != mean:
        return number(100 * mean, ".1f")
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{100 * mean:.1f} ± {100 * deviation:.1f}"


def _seconds(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.1f}"


def _finite(metrics: Metrics) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in metrics._asdict().items()}


def _draw(results: Results) -> None:
    need("matplotlib", "experiments")
    from kronfac.plots import accuracy_matrices

    labels = [get_strategy(name).title for name in results.strategies]
    axes = accuracy_matrices(
        [results.matrix(name) for name in results.strategies], labels, title=f"{results.stream}, {results.tasks} tasks"
    )
    with replace_atomically(results.folder / PICTURE) as stream:
        axes[0].figure.savefig(stream, format="png")  # type: ignore[union-attr]
