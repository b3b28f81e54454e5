"""The MNIST study of Puiu (2022), section 5 and supplement 7: runs of every row, resumable, then table and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kronfac.experiments.environment import environment, usable_cores
from kronfac.experiments.errors import ExperimentError, UnknownNameError, need
from kronfac.experiments.files import make_folder, write_json
from kronfac.experiments.lock import locked
from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.plan import check_device
from kronfac.experiments.problems import get_problem
from kronfac.experiments.reproduce.kld_wrm.archive import take_runs, write_runs
from kronfac.experiments.reproduce.kld_wrm.pictures import write_pictures
from kronfac.experiments.reproduce.kld_wrm.rows import ROWS, Row, choose
from kronfac.experiments.reproduce.kld_wrm.table import Summary, summarise, write_tables
from kronfac.experiments.reproduce.workers import Listener, train_all
from kronfac.experiments.results import RUN_FOLDERS, RunResult, read_run, run_folder
from kronfac.experiments.runner import RESULT
from kronfac.experiments.settings import RunSettings, check_settings

STUDY = "study.json"
#: Problem and number of training examples by the word that asks for them.
DATA = {"mnist": ("mnist-puiu", 60_000), "digits": ("digits-puiu", 1_500)}
#: Runs of each row; more would not even be listed in a minute.
_MOST_RUNS = 10_000
#: Where runs may have been finished.
_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Study:
    """What is to be run.

    Attributes:
        rows: Keys of `kld_wrm.rows.ROWS`, in the order of the table.
        runs: Runs of each row; run ``i`` has the seed ``i``.
        epochs: Passes through the training set.
        data: ``"mnist"`` or ``"digits"``.
        device: Torch device.
    """

    rows: tuple[str, ...]
    runs: int
    epochs: int
    data: str
    device: str = "cpu"

    def settings(self, row: Row, seed: int) -> RunSettings:
        """Give the settings of a run.

        Args:
            row: Its row.
            seed: Its seed.

        Returns:
            The settings; it is evaluated after every epoch.
        """
        name, examples = DATA[self.data]
        per_epoch = examples // get_problem(name).batch_size
        values = get_optimizer(row.optimizer).resolve(row.values)
        return RunSettings(name, row.optimizer, values, seed, self.epochs * per_epoch, None, per_epoch, self.device)

    def all_settings(self) -> list[RunSettings]:
        """List the runs: seeds outside, rows inside, so that an early end leaves equal numbers of each row.

        Returns:
            Their settings.
        """
        return [self.settings(ROWS[key], seed) for seed in range(self.runs) for key in self.rows]


@dataclass(frozen=True)
class Outcome:
    """What there is in a folder.

    Attributes:
        folder: The folder.
        study: What was asked for.
        summaries: A summary of each row.
    """

    folder: Path
    study: Study
    summaries: list[Summary]


def make_study(rows: Sequence[str], runs: int, epochs: int, data: str, device: str = "cpu") -> Study:
    """Check what is asked for.

    Args:
        rows: Names of rows as `rows.choose` takes them.
        runs: Runs of each.
        epochs: Passes through the training set.
        data: ``"mnist"`` or ``"digits"``.
        device: Torch device.

    Returns:
        The study.

    Raises:
        ExperimentError: A number is out of range.
        UnknownNameError: A name is unknown.
    """
    if data not in DATA:
        raise UnknownNameError("data", data, DATA)
    for name, value in (("runs", runs), ("epochs", epochs)):
        if value < 1:
            raise ExperimentError(f"{name} must be at least 1, got {value}")
    if runs > _MOST_RUNS:
        raise ExperimentError(f"runs must be at most {_MOST_RUNS}, got {runs}")
    check_device(device)
    study = Study(tuple(row.key for row in choose(rows)), runs, epochs, data, device)
    for settings in study.all_settings():
        check_settings(settings)
    return study


def reproduce(
    rows: Sequence[str] = ("all",),
    *,
    out: str | Path,
    runs: int = 10,
    epochs: int = 50,
    data: str = "mnist",
    device: str = "cpu",
    workers: int | None = None,
    table_only: bool = False,
    known: str | Path | None = None,
    command: str = "",
    listener: Listener | None = None,
) -> Outcome:
    """Train every row, and write the paper's table and figures with ours beside them.

    Called again after an interruption of any kind it goes on where it was; runs are kept by their settings, so that
    rows and runs can be added. The table counts finished runs alone and says how many there are.

    Args:
        rows: Keys of `rows.ROWS`, ``"all"``, ``"best"`` or a solver (``"kfac"``, ``"so"``, ``"q"``, ``"qe"``).
        out: The folder.
        runs: Runs of each row, with seeds 0, 1, …
        epochs: Passes through the training set.
        data: ``"mnist"``, or ``"digits"`` to try it in seconds without a download.
        device: Torch device of the runs. A run that was finished on another device is not trained again.
        workers: Processes, of one thread each; by default one for each core.
        table_only: Whether to train nothing, and look at the runs that are there.
        known: A ``runs.csv`` that such a study wrote: its runs are not trained again.
        command: How this was asked for.
        listener: Hears how it goes.

    Returns:
        The outcome.

    Raises:
        ExperimentError: An argument, a file or a run is unusable.
        KeyboardInterrupt: On Ctrl-C, after checkpoints.
    """  # noqa: DOC502
    study = make_study(rows, runs, epochs, data, device)
    if workers is not None and workers < 1:
        raise ExperimentError(f"workers must be at least 1, got {workers}")
    for module in ("pandas", "matplotlib"):
        need(module, "experiments")
    if table_only and known is None and not (Path(out) / RUN_FOLDERS).is_dir():
        raise ExperimentError(f"{out} holds no runs to make a table of, and table_only trains none")
    folder = make_folder(Path(out))
    with locked(folder):
        if known is not None:
            devices = dict.fromkeys((device, *_DEVICES))
            take_runs(Path(known), folder, [replace(s, device=d) for s in study.all_settings() for d in devices])
        if not table_only:
            found = environment() | {"threads": 1, "workers": workers or usable_cores()}
            write_json(folder / STUDY, {"study": asdict(study), "environment": found, "command": command})
            get_problem(DATA[data][0]).data()  # absent data are better known before processes are started
            wanted = [_where(folder, settings) for settings in study.all_settings()]
            train_all(wanted, folder, workers or usable_cores(), listener)
        results = {
            key: [read_run(folder, _where(folder, study.settings(ROWS[key], seed))) for seed in range(runs)]
            for key in study.rows
        }
        summaries = [summarise(ROWS[key], runs_of) for key, runs_of in results.items()]
        write_tables(folder, summaries, study.epochs)
        write_runs(folder, results)
        write_pictures(folder, {key: _drawable(runs_of) for key, runs_of in results.items()})
    return Outcome(folder, study, summaries)


def _where(folder: Path, settings: RunSettings) -> RunSettings:
    """Settings of the same run on whichever device it was finished; as they are if it was on none."""
    for device in dict.fromkeys((settings.device, *_DEVICES)):
        there = replace(settings, device=device)
        if (run_folder(folder, there) / RESULT).exists():
            return there
    return settings


def _drawable(runs: Sequence[RunResult]) -> list[RunResult]:
    return [run for run in runs if run.evaluations]


__all__ = ["DATA", "STUDY", "Outcome", "Study", "make_study", "reproduce"]
