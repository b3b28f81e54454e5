"""One table of every approximation against the exact curvature, over problems, states of training and sources."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.files import read_json, remove_leftovers, write_csv, write_json, write_text
from kronfac.experiments.problems import get_problem
from kronfac.experiments.problems.base import Data, Problem
from kronfac.experiments.sources import named_sources
from kronfac.experiments.subject import train_subject, training_settings
from kronfac.sources import DRAWN

Row = dict[str, Any]

#: The problems of the table in the documentation: a fully-connected, a convolutional, a residual network with batch
#: normalisation, and a transformer.
PROBLEMS = ("mnist14-mlp", "mnist14-cnn", "cifar10-resnet8", "mnist14-transformer")
MARKDOWN, CSV, PARTS = "approximation-error.md", "approximation-error.csv", ".approximation-error"
_LONGEST_REASON = 200


@dataclass(frozen=True)
class TableSettings:
    """Everything that decides the table.

    Attributes:
        problems: Names of problems.
        approximations: Names of approximations.
        sources: Names of sources.
        samples: Samples of the sampled source.
        examples: Examples whose curvature is compared.
        train_steps: Steps of training of the trained state.
        optimizer: Whose training.
        seed: Decides initial weights, the order of examples and sampled labels.
    """

    problems: tuple[str, ...]
    approximations: tuple[str, ...]
    sources: tuple[str, ...]
    samples: int = 1
    examples: int = 128
    train_steps: int = 500
    optimizer: str = "adam"
    seed: int = 0

    def part(self, problem: str, steps: int) -> str:
        """Name the file of one problem in one state, which changes with every setting that matters to it."""
        own = asdict(self) | {"problems": problem, "train_steps": steps}
        return f"{problem}-{steps}-{hashlib.sha256(json.dumps(own).encode()).hexdigest()[:10]}.json"

    def parts(self) -> list[str]:
        """Name the files of all problems in both states."""
        return [self.part(problem, steps) for problem in self.problems for steps in (0, self.train_steps)]


def measure_table(
    settings: TableSettings, folder: Path, begin: Callable[[str], object], memory_limit: int = 1 << 32
) -> list[Row]:
    """Compare, problem by problem; what an interrupted call has finished is not done again.

    Args:
        settings: What to compare.
        folder: Where finished parts are kept; an existing folder that nobody else writes to, see `locked`.
        begin: Called with a line before each piece of work.
        memory_limit: Bytes that the exact curvature may take.

    Returns:
        Rows of `kronfac.analysis.approximation_error`, with ``problem`` and ``steps``.
    """
    parts = folder / PARTS
    parts.mkdir(exist_ok=True)
    remove_leftovers(parts)
    rows: list[Row] = []
    for name in settings.problems:
        problem, data = get_problem(name), None
        for steps in (0, settings.train_steps):
            path = parts / settings.part(name, steps)
            if not path.exists():
                data = problem.data() if data is None else data
                found = _measure(problem, data, steps, settings, begin, memory_limit)
                write_json(path, {"rows": found})
            rows += _read_part(path)
    return rows


def _read_part(path: Path) -> list[Row]:
    rows = read_json(path).get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ExperimentError(f"{path} holds no part of a table; delete it to start anew")
    return rows


def _measure(
    problem: Problem,
    data: Data,
    steps: int,
    settings: TableSettings,
    begin: Callable[[str], object],
    memory_limit: int,
) -> list[Row]:
    from kronfac.analysis import approximation_error

    run = training_settings(problem, settings.optimizer, {}, steps, settings.seed)
    subject = train_subject(
        problem,
        run,
        data,
        steps,
        settings.examples,
        lambda step, loss: begin(f"{problem.name}: training, step {step}, batch loss {loss:.4g}"),
    )
    rows = approximation_error(
        subject.model,
        subject.likelihood,
        subject.batch,
        approximations=settings.approximations,
        sources=named_sources(settings.sources, settings.samples),
        seed=settings.seed,
        memory_limit=memory_limit,
        progress=lambda note: begin(f"{problem.name}, {steps} steps: {note}"),
    )
    return [{"problem": problem.name, "steps": steps, **row} for row in rows]


def write_table(settings: TableSettings, rows: Sequence[Row], folder: Path, command: str) -> list[Path]:
    """Write the table as Markdown, and every layer's figures as CSV; the finished parts of these settings are removed.

    Args:
        settings: What was compared.
        rows: What `measure_table` gave.
        folder: An existing folder that nobody else writes to, see `locked`.
        command: How the table was asked for, to be printed above it.

    Returns:
        The files.
    """
    write_text(folder / MARKDOWN, markdown(settings, rows, command))
    write_csv(folder / CSV, [{key: _rounded(value) for key, value in row.items()} for row in rows])
    parts = folder / PARTS
    for name in settings.parts():
        (parts / name).unlink(missing_ok=True)
    remove_leftovers(parts)
    with contextlib.suppress(OSError):  # other settings have parts there, which their own command goes on from
        parts.rmdir()
    return [folder / MARKDOWN, folder / CSV]


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def markdown(settings: TableSettings, rows: Sequence[Row], command: str) -> str:
    """Lay the table out.

    Args:
        settings: What was compared.
        rows: What `measure_table` gave.
        command: How the table was asked for.

    Returns:
        Markdown: what it shows, the table, and the reasons of refusals.
    """
    from kronfac.analysis import NETWORK

    cells = {
        (row["problem"], row["steps"], row["approximation"], row["source"]): row
        for row in rows
        if row["layer"] == NETWORK
    }
    notes: list[str] = []
    headings = ["problem", "training", "approximation"]
    for source in settings.sources:
        drawn = f"{source} ({settings.samples})" if source in DRAWN else source
        headings += [f"{drawn}: error", "trace", "update", "whole"]
    lines = ["| " + " | ".join(headings) + " |", "| --- | --- | --- |" + " ---: |" * (4 * len(settings.sources))]
    for problem in settings.problems:
        for steps in (0, settings.train_steps):
            state = "none" if steps == 0 else f"{steps} steps"
            group = {key: row for key, row in cells.items() if key[:2] == (problem, steps)}
            for method in settings.approximations:
                line = [problem, state, method]
                for source in settings.sources:
                    own = [row for key, row in group.items() if key[3] == source and key[2] != "dense"]
                    line += _figures(group[problem, steps, method, source], own, notes)
                lines.append("| " + " | ".join(line) + " |")
    about = (
        f"Written by `{command}`: {settings.examples} examples, seed {settings.seed}, float64; training by "
        f"{settings.optimizer}."
    )
    listed = "\n".join(f"{index}. {note}" for index, note in enumerate(notes, 1))
    return "\n".join([about, "", *lines, "", *([listed, ""] if notes else [])])


def _figures(row: Row, rivals: Sequence[Row], notes: list[str]) -> list[str]:
    """Error, trace ratio and cosines of updates; bold where none but the exact block does better."""
    if row["refused"]:
        return [f"refused ({_note(row['refused'], notes)})", "–", "–", "–"]
    fine = [each for each in rivals if not each["refused"]]
    error = f"{row['error']:.3f}"
    if row in fine and row["error"] == min(each["error"] for each in fine):
        error = f"**{error}**"
    updates = []
    for key in ("update_cosine", "full_update_cosine"):
        update = "–" if row[key] is None else f"{row[key]:.3f}"
        if row in fine and row[key] is not None and row[key] == max(each[key] or 0.0 for each in fine):
            update = f"**{update}**"
        updates.append(update)
    if row["note"]:
        updates[0] += f" ({_note(row['note'], notes)})"
    return [error, f"{row['trace_ratio']:.3f}", *updates]


def _note(text: str, notes: list[str]) -> int:
    text = " ".join(text.split())
    text = text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1].rsplit(" ", 1)[0] + " …"
    text = text.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")
    if text not in notes:
        notes.append(text)
    return notes.index(text) + 1
