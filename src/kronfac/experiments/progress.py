"""What a run tells while it works. The displays on a terminal are the command line's business."""

from __future__ import annotations

from collections.abc import Mapping

from kronfac.experiments.settings import RunSettings


class Progress:
    """Listens to runs; this one says nothing. Subclasses override what they show."""

    def plan(self, runs: int) -> None:
        """Hear how many runs there will be.

        Args:
            runs: Their number.
        """

    def message(self, text: str) -> None:
        """Hear something worth a line.

        Args:
            text: The line.
        """

    def started(self, settings: RunSettings, step: int) -> None:
        """Hear that a run begins or goes on.

        Args:
            settings: The run's settings.
            step: Steps that a checkpoint already holds.
        """

    def stepped(self, step: int, seconds: float, batch_loss: float) -> None:
        """Hear that a step was done.

        Args:
            step: Steps done.
            seconds: Seconds of training.
            batch_loss: The loss of the batch.
        """

    def evaluated(self, step: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """Hear the metrics of an evaluation.

        Args:
            step: Steps done.
            seconds: Seconds of training.
            metrics: The metrics.
        """

    def finished(self, settings: RunSettings, status: str, note: str) -> None:
        """Hear that a run has ended.

        Args:
            settings: The run's settings.
            status: ``"done"`` or ``"diverged"``.
            note: What there is to say about it, or nothing.
        """
