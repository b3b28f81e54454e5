"""What a comparison is going to do, decided and checked before the first step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields

import torch

from kronfac.experiments.errors import ExperimentError, UnknownNameError
from kronfac.experiments.optimizers import get_optimizer
from kronfac.experiments.problems import Problem, get_problem
from kronfac.experiments.settings import MAX_STEPS, MOST_THREADS, RunSettings, check_settings

#: Values to try, by optimiser and hyper-parameter.
Grid = Mapping[str, Mapping[str, Sequence[object]]]


@dataclass(frozen=True)
class Plan:
    """Everything that decides a comparison.

    Attributes:
        problem: Name of the problem.
        optimizers: Names of the optimisers, in the order of tables.
        hyperparameters: A value for every hyper-parameter of each optimiser, before tuning.
        grid: Values to tune over, by optimiser and hyper-parameter, or both ends of what is searched; empty for no
            tuning.
        grid_steps: Budget in steps of a tuning run; None for the whole budget.
        seeds: One run of each optimiser per seed; tuning uses the first.
        steps: Budget in steps, or None.
        epochs: Budget in passes through the training set, or None.
        seconds: Budget in training seconds, or None.
        evaluate_every: Steps between evaluations.
        metric: The figure that is tuned and compared; lower is better.
        device: Torch device.
        threads: Torch threads; results are reproducible for a given number of them.
        examples: Size of the training set, once it is loaded.
        targets: Values of the metric; when each optimiser reaches them is in the report.
        tried: Points that a search has come to, by optimiser; in place of all combinations of a grid's values.
    """

    problem: str
    optimizers: tuple[str, ...]
    hyperparameters: Mapping[str, Mapping[str, object]]
    grid: Grid
    grid_steps: int | None
    seeds: tuple[int, ...]
    steps: int | None
    epochs: float | None
    seconds: float | None
    evaluate_every: int
    metric: str
    device: str
    threads: int
    examples: int
    targets: tuple[float, ...] = ()
    tried: Mapping[str, Sequence[Mapping[str, object]]] = field(default_factory=dict)

    def settings(self, optimizer: str, values: Mapping[str, object], seed: int, tuning: bool = False) -> RunSettings:
        """Give the settings of one run.

        Args:
            optimizer: Name of the optimiser.
            values: All its hyper-parameters.
            seed: The seed.
            tuning: Whether it is a run of the grid, with the budget of those.

        Returns:
            The settings.
        """
        steps = self.steps
        if self.epochs is not None:
            size = int(values.get("batch_size") or get_problem(self.problem).batch_size)  # type: ignore[call-overload]
            by_epochs = max(1, round(self.epochs * (self.examples // size)))
            steps = by_epochs if steps is None else min(steps, by_epochs)
        if tuning and self.grid_steps is not None:
            steps = self.grid_steps
        return RunSettings(
            problem=self.problem,
            optimizer=optimizer,
            hyperparameters=dict(values),
            seed=seed,
            steps=steps,
            seconds=self.seconds,
            evaluate_every=self.evaluate_every,
            device=self.device,
        )

    def points(self, optimizer: str) -> list[dict[str, object]]:
        """List the grid of an optimiser, or what a search has tried.

        Args:
            optimizer: Its name.

        Returns:
            All its hyper-parameters for each point; empty if it is not tuned.
        """
        axes = self.grid.get(optimizer, {})
        if not axes:
            return []
        spec, base = get_optimizer(optimizer), self.hyperparameters[optimizer]
        if optimizer in self.tried:
            return [spec.resolve(base, point) for point in self.tried[optimizer]]
        return [spec.resolve(base, dict(zip(axes, point, strict=True))) for point in itertools.product(*axes.values())]

    def check_batches(self) -> None:
        """Refuse batches that are larger than the training set, once its size is known.

        Raises:
            ExperimentError: Naming the optimiser and the size.
        """
        for name in self.optimizers:
            for values in (self.hyperparameters[name], *self.points(name)):
                size = values["batch_size"]
                if size is not None and int(size) > self.examples:  # type: ignore[call-overload]
                    raise ExperimentError(
                        f"{name}.batch_size must be at most the {self.examples} training examples, got {size}"
                    )

    def as_json(self) -> dict[str, object]:
        """Turn the plan into what JSON can hold.

        Returns:
            A mapping that `from_json` takes.
        """
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> Plan:
        """Read a plan back.

        Args:
            value: What `as_json` gave.

        Returns:
            The plan.

        Raises:
            ExperimentError: If it is something else.
        """
        names = {field.name for field in fields(cls)}
        # Plans of earlier versions have neither.
        value = {"targets": (), "tried": {}, **value} if isinstance(value, dict) else {}
        if set(value) != names:
            raise ExperimentError("this is no plan of a kronfac comparison")
        return cls(**{**value, **{name: tuple(value[name]) for name in ("optimizers", "seeds", "targets")}})


def make_plan(
    problem: Problem,
    optimizers: Sequence[str],
    *,
    steps: int | None = None,
    epochs: float | None = None,
    seconds: float | None = None,
    seeds: Sequence[int] = (0,),
    hyperparameters: Mapping[str, Mapping[str, object]] | None = None,
    grid: Grid | None = None,
    grid_steps: int | None = None,
    metric: str | None = None,
    evaluate_every: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    targets: Sequence[float] = (),
    examples: int,
) -> Plan:
    """Complete and check what `kronfac.experiments.compare` is asked to do.

    Args:
        problem: The problem.
        optimizers: Names of optimisers.
        steps: Budget in steps; the problem's default if no budget is given at all.
        epochs: Budget in passes through the training set.
        seconds: Budget in training seconds. Of several budgets the first that is spent ends a run.
        seeds: Seeds.
        hyperparameters: Values that replace the problem's tuned ones, by optimiser and name.
        grid: Values to tune over, by optimiser and name.
        grid_steps: Budget in steps of a tuning run.
        metric: The figure to compare; the problem's by default.
        evaluate_every: Steps between evaluations; the problem's by default.
        device: Torch device.
        threads: Torch threads; those in use by default.
        targets: Values of the metric to reach.
        examples: Size of the training set.

    Returns:
        The plan.

    Raises:
        ExperimentError: Naming what is wrong.
        UnknownNameError: If a name is not registered.
    """
    given, grid = hyperparameters or {}, grid or {}
    if not optimizers:
        raise ExperimentError("no optimiser is named")
    if not seeds:
        raise ExperimentError("no seed is given")
    for kind, items in (("optimiser", optimizers), ("seed", seeds)):
        for item in items:
            if list(items).count(item) > 1:
                raise ExperimentError(f"{kind} {item!r} is named twice")
    for name in (*given, *grid):
        if name not in optimizers:
            get_optimizer(name)
            raise ExperimentError(
                f"hyper-parameters are given for {name!r}, which is not among the optimisers compared"
            )
    if metric is not None and metric not in problem.metrics:
        raise UnknownNameError(f"metric of {problem.name}", metric, problem.metrics)
    if epochs is not None and not 0 < epochs <= MAX_STEPS:
        raise ExperimentError(f"epochs must be a number above 0 and at most {MAX_STEPS:g}, got {epochs!r}")
    for name, value, most in (("threads", threads, MOST_THREADS), ("grid_steps", grid_steps, MAX_STEPS)):
        if value is not None and not 1 <= value <= most:
            raise ExperimentError(f"{name} must be a whole number of at least 1 and at most {most}, got {value!r}")
    for target in targets:
        if not math.isfinite(target):
            raise ExperimentError(f"targets must be finite numbers, got {target!r}")
    check_device(device)
    plan = Plan(
        problem=problem.name,
        optimizers=tuple(optimizers),
        hyperparameters={
            name: get_optimizer(name).resolve(problem.tuned.get(name, {}), given.get(name, {})) for name in optimizers
        },
        grid={name: {key: list(values) for key, values in axes.items()} for name, axes in grid.items()},
        grid_steps=grid_steps,
        seeds=tuple(seeds),
        steps=problem.steps if steps is None and epochs is None and seconds is None else steps,
        epochs=epochs,
        seconds=seconds,
        evaluate_every=problem.evaluate_every if evaluate_every is None else evaluate_every,
        metric=metric or problem.metric,
        device=device,
        threads=threads or torch.get_num_threads(),
        examples=examples,
        targets=tuple(float(target) for target in targets),
    )
    for name in plan.optimizers:
        _check_effect(plan, name, given.get(name, {}))
        for seed in plan.seeds:
            check_settings(plan.settings(name, plan.hyperparameters[name], seed))
    return plan


def _check_effect(plan: Plan, name: str, given: Mapping[str, object]) -> None:
    """Refuse what was asked for and would change nothing."""
    axes, values = plan.grid.get(name, {}), plan.hyperparameters[name]
    if both := [key for key in axes if key in given]:
        raise ExperimentError(f"{name}.{both[0]} is both set to {given[both[0]]} and in the grid: give one of them")
    points = plan.points(name)
    if any(point in points[:index] for index, point in enumerate(points)):
        raise ExperimentError(f"the grid of {name} names a value twice: {dict(axes)}")
    for key, other in get_optimizer(name).without_effect(values).items():
        if key in (*given, *axes) and other not in axes:
            raise ExperimentError(f"{name}.{key} has no effect with {other}={values[other]}")
    if "damping" in given and "factor_damping" in given and values["factor_damping"] is not None:
        raise ExperimentError(f"{name}.factor_damping takes the place of {name}.damping: give one of them")


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Args:
        device: A torch device.

    Raises:
        ExperimentError: Naming it, and what torch says.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ExperimentError(f"device {device!r} is not usable: {str(error).splitlines()[0]}") from error
    if torch.device(device).type == "meta":
        raise ExperimentError(f"device {device!r} is not usable: its tensors have shapes, but no numbers")
