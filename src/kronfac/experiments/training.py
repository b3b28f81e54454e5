"""One training in progress: everything that changes from step to step, and how to save and restore it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kronfac.experiments.averaging import IterateAverage
from kronfac.experiments.batches import Batches
from kronfac.experiments.errors import ExperimentError
from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.problems.base import Data, Problem
from kronfac.experiments.schedules import Schedule
from kronfac.experiments.settings import RunSettings


class Diverged(ArithmeticError):
    """The loss, or something on the way to it, is no longer finite."""


class Training:
    """A network, its optimiser and their position in the run.

    Args:
        problem: The problem.
        settings: The run's settings, checked.
        data: The problem's data, on the run's device.
        stopped: Asked between the batches of a warm-up, which is one step, whether the run shall end.
    """

    def __init__(
        self, problem: Problem, settings: RunSettings, data: Data, stopped: Callable[[], bool] = lambda: False
    ) -> None:
        self._stopped = stopped
        values = settings.hyperparameters
        self.problem, self.settings, self.data = problem, settings, data
        size = int(values.get("batch_size") or problem.batch_size)  # type: ignore[call-overload]
        self.batches = Batches(data, size, settings.seed, values["crop_padding"], values["mirror"])  # type: ignore[arg-type]
        self.model = problem.model(settings.seed).to(settings.device)
        self.generator = torch.Generator(settings.device).manual_seed(settings.seed)
        spec = get_optimizer(settings.optimizer)
        self.optimizer, self.closure = spec.build(self.model, problem, values, self.generator), spec.closure
        self.average = IterateAverage(self.model, float(values["average"]))  # type: ignore[arg-type]
        self.schedule = Schedule.of(values)
        self.first_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.step, self.seconds, self.batch_loss = 0, 0.0, math.nan

    @property
    def on_gpu(self) -> bool:
        """Whether the run is on a CUDA device."""
        return torch.device(self.settings.device).type == "cuda"

    @property
    def epoch(self) -> float:
        """Passes through the training set."""
        return self.step / self.batches.per_epoch

    def advance(self) -> None:
        """Do one step, and count its time.

        Raises:
            Diverged: If the loss of the batch is not finite, or the optimiser finds that something else is not.
            ExperimentError: If the optimiser refuses something that is finite.
        """
        start = time.perf_counter()
        inputs, targets = self.batches.at(self.step)
        if self.schedule.kind != "constant":
            scale = self.schedule.factor(self.settings.budget.progress(self.step, self.seconds), self.epoch)
            for group, lr in zip(self.optimizer.param_groups, self.first_lrs, strict=True):
                group["lr"] = lr * scale
        self.optimizer.zero_grad()
        try:
            if self.step == 0 and (count := self.settings.hyperparameters.get("warm_up")):
                self.optimizer.warm_up(self._warming(count))  # type: ignore[attr-defined, arg-type]
            if self.closure:
                self.batch_loss = float(self.optimizer.step(lambda: self._loss(inputs, targets)))  # type: ignore[arg-type, return-value]
            else:
                loss = self._loss(inputs, targets)
                self.batch_loss = loss.item()
                if not math.isfinite(self.batch_loss):
                    raise Diverged(f"the loss is {self.batch_loss}")
                loss.backward()
                self.optimizer.step()
        except (ArithmeticError, torch.linalg.LinAlgError) as error:  # OverflowError among them
            raise Diverged(str(error)) from error
        except ValueError as error:  # curvature refuses outputs that are not finite before the loss is seen
            if self._finite(inputs, targets):
                raise ExperimentError(f"{self.settings.optimizer} on {self.problem.name}: {error}") from error
            raise Diverged(str(error)) from error
        self.average.update()
        self.step += 1
        if self.on_gpu:
            torch.cuda.synchronize(self.settings.device)  # what was launched belongs to this step's seconds
        self.seconds += time.perf_counter() - start

    def _warming(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(count):
            if self._stopped():
                raise KeyboardInterrupt
            yield self.batches.at(index)

    def diagnostics(self) -> dict[str, float]:
        """What a self-tuning optimiser says about its last step.

        Returns:
            Finite numbers by name; nothing for other optimisers.
        """
        report = getattr(self.optimizer, "report", None)
        values = {} if report is None else report.to_dict()
        return {f"step_{k}": v for k, v in values.items() if k != "step" and v is not None and math.isfinite(v)}

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self.settings.hyperparameters.get("source") != "empirical":
            return self.problem.loss(self.model(inputs), targets)
        with self.optimizer.capture() as capture:  # type: ignore[attr-defined]  # which needs the targets
            outputs = self.model(inputs)
            capture(outputs, targets)
        return self.problem.loss(outputs, targets)

    def _finite(self, inputs: Tensor, targets: Tensor) -> bool:
        self.model.eval()  # in which no statistics are gathered
        try:
            with torch.no_grad():
                return math.isfinite(self.problem.loss(self.model(inputs), targets).item())
        finally:
            self.model.train()

    def evaluate(self) -> dict[str, float]:
        """Compute the problem's metrics with the averaged weights, or the current ones if there is no average.

        Returns:
            A finite value for each metric.

        Raises:
            Diverged: If one of them is not finite.
        """
        with torch.no_grad(), self.average.applied():
            metrics = self.problem.evaluate(self.model, self.data)
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise Diverged(f"{name} is {value}")
        return metrics

    def state_dict(self) -> dict[str, object]:
        """Give everything that `load_state_dict` needs to go on as if nothing had happened.

        Returns:
            Tensors and numbers only.
        """
        return {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "generator": self.generator.get_state(),
            "global_generator": torch.get_rng_state(),
            # Dropout draws from the device's own.
            **({"device_generator": torch.cuda.get_rng_state(self.settings.device)} if self.on_gpu else {}),
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore a state.

        Args:
            state: What `state_dict` gave.
        """
        self.model.load_state_dict(state["model"])  # type: ignore[arg-type]
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
        self.average.load_state_dict(state["average"])  # type: ignore[arg-type]
        # After the optimiser: it may hold this very generator and set it too.
        self.generator.set_state(state["generator"])  # type: ignore[arg-type]
        torch.set_rng_state(state["global_generator"])  # type: ignore[arg-type]
        if self.on_gpu:
            torch.cuda.set_rng_state(state["device_generator"], self.settings.device)  # type: ignore[arg-type]
        self.step, self.seconds = int(state["step"]), float(state["seconds"])  # type: ignore[call-overload, arg-type]
