"""Evaluations of finished runs in one table, to publish them, and to count them in another folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.files import make_folder, write_csv, write_json, write_text
from kronfac.experiments.results import RunResult, run_folder
from kronfac.experiments.runner import METRICS, RESULT
from kronfac.experiments.settings import RunSettings

RUNS = "runs.csv"
_KEYS = ("row", "run", "seed", "device")
_NEEDED = ("step", "epoch", "seconds", "train_loss", "train_error", "test_loss", "test_error")


def write_runs(folder: Path, results: Mapping[str, Sequence[RunResult]]) -> None:
    """Write ``runs.csv``, if any run is finished: a line for each evaluation of each finished run.

    Args:
        folder: Where.
        results: Runs by the key of their row.
    """
    lines: list[dict[str, object]] = [
        {"row": key, "run": run.settings.folder_name, "seed": run.settings.seed, "device": run.settings.device} | record
        for key, runs in results.items()
        for run in runs
        if run.status == "done"
        for record in run.evaluations
    ]
    if lines:
        columns = {column: None for line in lines for column in line}
        write_csv(folder / RUNS, [columns | line for line in lines])


def take_runs(known: Path, folder: Path, wanted: Sequence[RunSettings]) -> int:
    """Put finished runs of another folder's ``runs.csv`` where they need not be trained.

    A run is the same if all its settings are: its name holds a digest of them.

    Args:
        known: The table.
        folder: Folder of the study.
        wanted: Settings of the runs that are asked for; others are left out, and finished ones are left as they are.

    Returns:
        How many were taken.

    Raises:
        ExperimentError: The table is absent or damaged.
    """
    found = _read(known)
    taken = 0
    for settings in wanted:
        path, records = run_folder(folder, settings), found.get(settings.folder_name)
        if records is None or (path / RESULT).exists():
            continue
        last = records[-1]
        if last["step"] != settings.steps:
            raise ExperimentError(
                f"{known}: run {settings.folder_name} ends at step {last['step']}, not {settings.steps}"
            )
        make_folder(path)
        write_text(path / METRICS, "".join(json.dumps(record) + "\n" for record in records))
        note = f"taken from {known.name}"
        write_json(path / RESULT, {"status": "done", "note": note, "step": last["step"], "seconds": last["seconds"]})
        taken += 1
    return taken


def _read(known: Path) -> dict[str, list[dict[str, float]]]:
    """Evaluations by run, in the order of the file."""
    try:
        with known.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if absent := [name for name in (*_KEYS, *_NEEDED) if name not in (reader.fieldnames or ())]:
                raise ExperimentError(f"{known} is no table of runs: it has no columns {', '.join(absent)}")
            runs: dict[str, list[dict[str, float]]] = {}
            for line in reader:
                runs.setdefault(line["run"], []).append(_record(line, known, reader.line_num))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ExperimentError(f"cannot read {known}: {error}") from error
    return runs


def _record(line: Mapping[str, str], known: Path, number: int) -> dict[str, float]:
    try:
        numbers = {key: float(text) for key, text in line.items() if key not in _KEYS and text}
        return numbers | {"step": int(line["step"])} | {key: numbers[key] for key in _NEEDED if key != "step"}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExperimentError(f"{known}, line {number}: {error}") from error
