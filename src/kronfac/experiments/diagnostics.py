"""What self-tuning optimisers reported step by step: a picture, and TensorBoard's files where that is installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kronfac.experiments.errors import need
from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.pictures import save_figure
from kronfac.experiments.records import read_records
from kronfac.experiments.results import Results, run_folder
from kronfac.experiments.runner import METRICS
from kronfac.experiments.settings import RunSettings


def draw_diagnostics(results: Results) -> list[Path]:
    """Draw what self-tuning optimisers reported, one picture for each of their runs.

    Args:
        results: The comparison.

    Returns:
        The files written: ``diagnostics-<optimizer>-<seed>.png``.
    """
    need("matplotlib", "experiments")
    from kronfac.plots.diagnostics import step_reports

    written = []
    for settings, records in _reports(results):
        panels = step_reports(records, prefix="step_")
        written.append(save_figure(panels[0], results.folder / f"diagnostics-{settings.optimizer}-{settings.seed}.png"))
    return written


def write_tensorboard(results: Results) -> Path | None:
    """Write the reports as scalars for TensorBoard.

    Args:
        results: The comparison.

    Returns:
        The folder to point TensorBoard at, or None where it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    folder = results.folder / "tensorboard"
    for settings, records in _reports(results):
        with SummaryWriter(str(folder / f"{settings.optimizer}-{settings.seed}")) as writer:
            for record in records:
                for name, value in record.items():
                    if name.startswith("step_"):
                        writer.add_scalar(name.removeprefix("step_"), value, int(record["step"]))
    return folder


def _reports(results: Results) -> Iterator[tuple[RunSettings, list[dict[str, float]]]]:
    """The lines with reports of each run of a self-tuning optimiser."""
    for run in results.runs:
        if get_optimizer(run.settings.optimizer).closure:
            records = read_records(run_folder(results.folder, run.settings) / METRICS)
            yield run.settings, [record for record in records if "step_lam" in record]
