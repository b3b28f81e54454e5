"""Search for hyper-parameters: where to look, and which values to try next (by Optuna)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kronfac.experiments.errors import ExperimentError, need
from kronfac.experiments.optimizers import OptimizerSpec

#: A range of more than this ratio between its ends is searched on a logarithmic scale.
_WIDE = 10.0
#: By how much the default ranges reach beyond a problem's values on either side, and what they are of.
_REACH = 30.0
_SEARCHED = ("lr", "damping")
#: Values are tried to so many digits, which are those that tables show.
_DIGITS = 3
# Spreads the seeds of searches apart, so that trial 1 of seed 0 is not trial 0 of seed 1.
_STRIDE = 100_003


@dataclass(frozen=True)
class Range:
    """Numbers between two ends.

    Attributes:
        low: Lower end.
        high: Upper end.
        whole: Whether they are whole numbers.
    """

    low: float
    high: float
    whole: bool = False

    @property
    def logarithmic(self) -> bool:
        """Whether equal ratios are equally likely."""
        return self.low > 0 and self.high / self.low > _WIDE

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends, as numbers of the range's kind."""
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)


#: Where to look along one hyper-parameter: a range, or the choices there are.
Axis = Range | tuple[object, ...]


@dataclass(frozen=True)
class Search:
    """What is searched, and how long.

    Attributes:
        trials: Runs for each optimiser; the first is with the problem's own values.
        axes: Where to look, by optimiser and hyper-parameter.
    """

    trials: int
    axes: Mapping[str, Mapping[str, Axis]]


def read_axis(text: str) -> Axis:
    """Read ``low:high`` or ``one,another``.

    Args:
        text: The text.

    Returns:
        The axis.

    Raises:
        ExperimentError: If it is neither.
    """
    if ":" not in text:
        return tuple(word.strip() for word in text.split(",") if word.strip())
    try:
        low, high = (float(end) for end in text.split(":"))
    except ValueError:
        low, high = math.nan, math.nan
    if not low < high or not (math.isfinite(low) and math.isfinite(high)):
        raise ExperimentError(f"a range is low:high, two numbers in this order, or choices with commas, got {text!r}")
    return Range(low, high, whole=all("." not in end and "e" not in end.lower() for end in text.split(":")))


def axes_of(spec: OptimizerSpec, base: Mapping[str, object], given: Mapping[str, Axis]) -> dict[str, Axis]:
    """Complete what is given by ranges around the learning rate and the damping in use, and check it.

    Args:
        spec: The optimiser.
        base: Its hyper-parameters.
        given: Axes that were asked for; if there are any, nothing else is searched.

    Returns:
        The axes.

    Raises:
        ExperimentError: If there is nothing to search, or an end of a range is no value of the hyper-parameter.
    """
    if given:
        axes = dict(given)
    else:
        numbers = {name: base.get(name) for name in _SEARCHED}
        axes = {
            name: Range(_rounded(value / _REACH), _rounded(value * _REACH))
            for name, value in numbers.items()
            if isinstance(value, float) and value > 0
        }
    if not axes:
        raise ExperimentError(f"{spec.name} has no learning rate and no damping to search; name a range: NAME=low:high")
    for name, axis in axes.items():
        for value in axis.ends if isinstance(axis, Range) else axis:
            spec.resolve(base, {name: value})
        if isinstance(axis, tuple) and not axis:
            raise ExperimentError(f"{spec.name}.{name}: no values to choose from")
        if isinstance(axis, tuple) and len({spec.resolve(base, {name: value})[name] for value in axis}) < len(axis):
            raise ExperimentError(f"{spec.name}.{name}: a value to choose from is named twice")
    return axes


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


class Trials:
    """Which values to try next: Optuna's tree-structured Parzen estimator, after ten at random.

    What is asked depends on the seed and on the results so far alone, so that a search that was stopped is gone on
    with by asking and answering from the start, with results that are there already.

    Args:
        axes: Where to look.
        base: The values to begin with.
        seed: The seed.
    """

    def __init__(self, axes: Mapping[str, Axis], base: Mapping[str, object], seed: int) -> None:
        self._optuna: Any = need("optuna", "sweep")
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        self._axes, self._seed, self._base = axes, seed, base
        self._study = self._optuna.create_study()
        self._trial: Any = None

    def ask(self) -> dict[str, object]:
        """Choose the next point.

        Returns:
            A value for each axis.
        """
        number = len(self._study.trials)
        self._study.sampler = self._optuna.samplers.TPESampler(seed=self._seed * _STRIDE + number)
        if number == 0 and all(_holds(axis, self._base.get(name)) for name, axis in self._axes.items()):
            self._study.enqueue_trial({name: _shown(axis, self._base[name]) for name, axis in self._axes.items()})
        self._trial = self._study.ask()
        return {name: self._suggest(name, axis) for name, axis in self._axes.items()}

    def tell(self, value: float) -> None:
        """Say what came of it.

        Args:
            value: The figure to be minimised; infinite for a run that diverged.
        """
        self._study.tell(self._trial, value)

    def _suggest(self, name: str, axis: Axis) -> object:
        if not isinstance(axis, Range):
            return axis[self._trial.suggest_categorical(name, list(range(len(axis))))]
        if axis.whole:
            return self._trial.suggest_int(name, int(axis.low), int(axis.high), log=axis.logarithmic)
        return _rounded(self._trial.suggest_float(name, axis.low, axis.high, log=axis.logarithmic))


def _holds(axis: Axis, value: object) -> bool:
    if isinstance(axis, Range):
        return isinstance(value, (int, float)) and axis.low <= value <= axis.high
    return str(value) in map(str, axis)


def _shown(axis: Axis, value: object) -> object:
    """What Optuna calls a value: choices are numbered."""
    return value if isinstance(axis, Range) else [str(choice) for choice in axis].index(str(value))


def near_an_end(ends: Sequence[object], value: object) -> bool:
    """Whether the best value lies at an end of the range that was searched.

    Args:
        ends: Both ends.
        value: The value.

    Returns:
        True if it is within a tenth of one, or of the whole way where an end is not positive.
    """
    low, high, at = (float(number) for number in (*ends, value))  # type: ignore[arg-type]
    if low > 0:
        return at < 1.1 * low or at > high / 1.1
    return min(at - low, high - at) < 0.1 * (high - low)
