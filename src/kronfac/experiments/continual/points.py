"""The runs of a grid, what the newest task alone would choose among them, and the files that hold them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from kronfac.experiments.continual.results import (
    Failure,
    Origin,
    failure_lines,
    progress,
    read_lines,
    split_failures,
    write_lines,
)
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.files import read_json, write_json

POINTS, ABOUT = "grid.jsonl", "grid.json"
#: Far below what one example makes of an accuracy: 0.1 - 0.01 is above 0.09.
_ROUNDING = 1e-9


class Point(NamedTuple):
    """A run of the grid.

    Attributes:
        strategy: Name of the strategy.
        balance: How the penalty was weighed; ``"none"`` without penalty.
        settings: All settings of the run.
        target: Target accuracy, from 0 to 1.
        average: Average accuracy on all test sets at the end.
    """

    strategy: str
    balance: str
    settings: dict[str, object]
    target: float
    average: float


@dataclass(frozen=True)
class Grid:
    """All runs of a search.

    Attributes:
        stream: Name of the stream.
        folder: Where its files are.
        points: The runs.
        slack: How much target accuracy is given for a stronger penalty.
        tasks: Number of tasks.
        failures: The runs that came to no end.
        origin: How they were run.
        planned: How many runs were asked for; 0 where an earlier version wrote the files.
    """

    stream: str
    folder: Path
    points: list[Point]
    slack: float = 0.01
    tasks: int = 0
    failures: list[Failure] = field(default_factory=list)
    origin: Origin = field(default_factory=Origin)
    planned: int = 0

    @property
    def progress(self) -> str:
        """How many runs are finished, in words; nothing if all are."""
        return progress(len(self.points) + len(self.failures), self.planned)

    def panels(self) -> dict[tuple[str, str], list[Point]]:
        """Group the runs.

        Returns:
            Runs by strategy and balance, in order.
        """
        found: dict[tuple[str, str], list[Point]] = {}
        for point in self.points:
            found.setdefault((point.strategy, point.balance), []).append(point)
        return found

    def chosen(self, strategy: str, balance: str) -> Point:
        """Choose by target accuracy alone.

        A weaker penalty hinders the newest task less, so that the best target accuracy asks for none. What is chosen is
        the strongest one, then the largest damping, whose target accuracy is within ``slack`` of the best.

        Args:
            strategy: Name of the strategy.
            balance: How the penalty was weighed.

        Returns:
            The run; of equals that with the better target accuracy.
        """
        points = self.panels()[strategy, balance]
        best = max(point.target for point in points)
        near = [point for point in points if point.target >= best - self.slack - _ROUNDING]
        return max(near, key=lambda p: (p.settings["strength"], p.settings["damping"], p.target))

    def lines(self) -> list[dict[str, object]]:
        """Give all runs as plain values.

        Returns:
            The points; then ``settings`` and ``failure`` of the runs that came to no end.
        """
        return [*(point._asdict() for point in self.points), *failure_lines(self.failures)]


def save_grid(grid: Grid) -> None:
    """Write ``grid.jsonl``, and what `read_grid` needs beside it.

    Args:
        grid: All runs.
    """
    write_lines(grid.folder / POINTS, grid.lines())
    about = {"stream": grid.stream, "tasks": grid.tasks, "slack": grid.slack, "planned": grid.planned}
    write_json(grid.folder / ABOUT, {**about, **vars(grid.origin)})


def read_grid(folder: Path) -> Grid:
    """Read what `save_grid` wrote.

    Args:
        folder: The folder.

    Returns:
        All runs.

    Raises:
        ExperimentError: If a file is absent or damaged.
    """
    about = read_json(folder / ABOUT)
    lines, failures = split_failures(read_lines(folder / POINTS))
    try:
        points = [Point(**line) for line in lines]  # type: ignore[arg-type]
        origin = Origin(about["command"], about["environment"])  # type: ignore[arg-type]
        slack, tasks = float(str(about["slack"])), int(str(about["tasks"]))
        planned = int(str(about.get("planned", 0)))
        return Grid(str(about["stream"]), folder, points, slack, tasks, failures, origin, planned)
    except (KeyError, TypeError, ValueError) as error:
        raise ExperimentError(f"{folder / ABOUT} and {POINTS} do not go together; run the command again") from error
