"""What strategies on one stream remembered, and the files that hold it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kronfac.experiments.continual.metrics import Metrics, metrics_of
from kronfac.experiments.environment import environment
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.files import read_json, without_nan, write_json, write_text

LINES, ABOUT = "results.jsonl", "strategies.json"


@dataclass(frozen=True)
class Failure:
    """A run that came to no end.

    Attributes:
        settings: The run's settings.
        reason: What went wrong.
    """

    settings: dict[str, object]
    reason: str


@dataclass(frozen=True)
class Origin:
    """How, and on what, something was run.

    Attributes:
        command: The command, or the call.
        environment: Machine and versions.
    """

    command: str = ""
    environment: dict[str, object] = field(default_factory=dict)

    @classmethod
    def now(cls, command: str, threads: int | None) -> Origin:
        """Describe this moment.

        Args:
            command: The command.
            threads: Torch threads; None for those in use.

        Returns:
            The origin.
        """
        return cls(command, environment() | {"threads": threads or torch.get_num_threads()})


@dataclass(frozen=True)
class Results:
    """What a comparison of strategies found.

    Attributes:
        stream: Name of the stream.
        tasks: Number of tasks.
        folder: Where its files are.
        strategies: Names, in order.
        runs: For each strategy, the ``result.json`` of each seed that was done.
        failures: The runs that came to no end.
        origin: How they were run.
        planned: How many runs were asked for; 0 where an earlier version wrote the files.
    """

    stream: str
    tasks: int
    folder: Path
    strategies: list[str]
    runs: dict[str, list[dict[str, object]]]
    failures: list[Failure] = field(default_factory=list)
    origin: Origin = field(default_factory=Origin)
    planned: int = 0

    @property
    def done(self) -> list[str]:
        """The strategies that have a run at least."""
        return [name for name in self.strategies if self.runs[name]]

    @property
    def progress(self) -> str:
        """How many runs are finished, in words; nothing if all are."""
        return progress(sum(map(len, self.runs.values())) + len(self.failures), self.planned)

    def failed(self, strategy: str) -> int:
        """Count the failures of a strategy.

        Args:
            strategy: The strategy's name.

        Returns:
            How many of its runs came to no end.
        """
        return sum(failure.settings["strategy"] == strategy for failure in self.failures)

    def matrices(self, strategy: str) -> Tensor:
        """Accuracy matrices of a strategy.

        Args:
            strategy: The strategy's name.

        Returns:
            ``[seeds, tasks, tasks]``, from 0 to 1. Row i: accuracy on each task after task i.
        """
        return torch.tensor([run["matrix"] for run in self.runs[strategy]], dtype=torch.float64)

    def matrix(self, strategy: str) -> list[list[float]]:
        """Mean accuracy matrix over seeds.

        Args:
            strategy: The strategy's name.

        Returns:
            Row i: accuracy on each task after task i.
        """
        return self.matrices(strategy).mean(0).tolist()

    def metrics(self, strategy: str) -> list[Metrics]:
        """Figures of each seed.

        Args:
            strategy: The strategy's name.

        Returns:
            One for each run.
        """
        return [metrics_of(run["initial"], run["matrix"]) for run in self.runs[strategy]]  # type: ignore[arg-type]

    def lines(self) -> list[dict[str, object]]:
        """Give all runs as plain values.

        Returns:
            Each run's ``result.json`` with its figures, NaN as None; then ``settings`` and ``failure`` of the others.
        """
        done = [
            {**run, **without_nan(metrics._asdict())}
            for name in self.strategies
            for run, metrics in zip(self.runs[name], self.metrics(name), strict=True)
        ]
        return done + failure_lines(self.failures)


def save_results(results: Results) -> None:
    """Write ``results.jsonl``, and what `read_results` needs beside it.

    Args:
        results: The comparison.
    """
    write_lines(results.folder / LINES, results.lines())
    about = {"stream": results.stream, "tasks": results.tasks, "strategies": results.strategies}
    write_json(results.folder / ABOUT, {**about, "planned": results.planned, **vars(results.origin)})


def read_results(folder: Path) -> Results:
    """Read what `save_results` wrote.

    Args:
        folder: The folder.

    Returns:
        The comparison.

    Raises:
        ExperimentError: If a file is absent or damaged.
    """
    about, lines = read_json(folder / ABOUT), read_lines(folder / LINES)
    try:
        runs: dict[str, list[dict[str, object]]] = {name: [] for name in about["strategies"]}  # type: ignore[attr-defined]
        done, failures = split_failures(lines)
        for run in done:
            runs[run["settings"]["strategy"]].append(run)  # type: ignore[index]
        origin = Origin(about["command"], about["environment"])  # type: ignore[arg-type]
        tasks, planned = int(str(about["tasks"])), int(str(about.get("planned", 0)))
        return Results(str(about["stream"]), tasks, folder, list(runs), runs, failures, origin, planned)
    except (KeyError, TypeError, ValueError) as error:
        raise ExperimentError(f"{folder / ABOUT} and {LINES} do not go together; run the command again") from error


def progress(ended: int, planned: int) -> str:
    """Say how many runs are finished.

    Args:
        ended: Runs that were done or failed.
        planned: Runs that were asked for.

    Returns:
        A few words; nothing if all are finished.
    """
    return f"finished: {ended} of {planned} runs" if ended < planned else ""


def failure_lines(failures: Iterable[Failure]) -> list[dict[str, object]]:
    """Give failures as plain values.

    Args:
        failures: The failures.

    Returns:
        ``settings`` and ``failure`` of each.
    """
    return [{"settings": failure.settings, "failure": failure.reason} for failure in failures]


def split_failures(lines: Iterable[dict[str, object]]) -> tuple[list[dict[str, object]], list[Failure]]:
    """Separate what was done from what failed.

    Args:
        lines: Both.

    Returns:
        The lines of what was done, and the failures.
    """
    done, failures = [], []
    for line in lines:
        if "failure" in line:
            failures.append(Failure(line["settings"], str(line["failure"])))  # type: ignore[arg-type]
        else:
            done.append(line)
    return done, failures


def write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write JSON lines.

    Args:
        path: The file.
        rows: The lines, without NaN.
    """
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict[str, object]]:
    """Read JSON lines.

    Args:
        path: The file.

    Returns:
        The lines.

    Raises:
        ExperimentError: If the file is absent or damaged.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ExperimentError(f"{path} cannot be read ({error}); run the command again") from error
