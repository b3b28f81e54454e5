"""Hyper-parameters: their names, their defaults, and what values they may have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kronfac.experiments.schedules import KINDS

#: Turns a value, or the text of one, into the value; raises ValueError saying what is accepted.
Parser = Callable[[object], object]


@dataclass(frozen=True)
class Option:
    """One hyper-parameter.

    Attributes:
        name: Its name.
        default: Its value where neither the problem nor the user gives one.
        parse: Checks and converts a value.
        help: One line for people.
        later: Whether it came after runs had been published: a run with the default has the name that it had without.
        idle: Another hyper-parameter, and its values with which this one does nothing.
    """

    name: str
    default: object
    parse: Parser
    help: str
    later: bool = False
    idle: tuple[str, tuple[object, ...]] | None = None


#: The largest number in float32.
_LARGEST = torch.finfo(torch.float32).max


def number(low: float = -math.inf, high: float = math.inf, open_low: bool = False, open_high: bool = False) -> Parser:
    """Accept a number in an interval, no larger than float32 holds: parameters are multiplied by it.

    Args:
        low: Lower end.
        high: Upper end.
        open_low: Whether the lower end itself is excluded.
        open_high: Whether the upper end itself is excluded.

    Returns:
        The parser; it gives a float.
    """
    wanted = "a number"
    if low > -math.inf:
        wanted += f" {'above' if open_low else 'of at least'} {low:g}"
    if high < math.inf:
        wanted += f"{' and' if low > -math.inf else ''} {'below' if open_high else 'at most'} {high:g}"

    def parse(value: object) -> float:
        try:
            result = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            result = math.nan
        above = result > low if open_low else result >= low
        below = result < high if open_high else result <= high
        if not (math.isfinite(result) and above and below):
            raise ValueError(wanted)
        if abs(result) > _LARGEST:
            raise ValueError(f"{wanted}, {_LARGEST:.1e} at most")
        return result

    return parse


def integer(low: int, high: int | None = None) -> Parser:
    """Accept a whole number.

    Args:
        low: The smallest one.
        high: The largest one; None for no limit.

    Returns:
        The parser; it gives an int.
    """
    wanted = f"a whole number of at least {low}" + ("" if high is None else f" and at most {high}")

    def parse(value: object) -> int:
        try:
            result = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            result = math.nan
        above = high is not None and result > high
        if isinstance(value, bool) or not result.is_integer() or result < low or above:
            raise ValueError(wanted)
        return int(result)

    return parse


def choice(*allowed: str) -> Parser:
    """Accept one of several words.

    Args:
        allowed: The words.

    Returns:
        The parser; it gives a str.
    """

    def parse(value: object) -> str:
        if value not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return str(value)

    return parse


def flag(value: object) -> bool:
    """Accept true or false.

    Args:
        value: A bool, or the text of one.

    Returns:
        The bool.

    Raises:
        ValueError: If it is neither.
    """
    words = {"true": True, "false": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError("true or false")


def optional(parse: Parser) -> Parser:
    """Accept also None, written ``none`` as text.

    Args:
        parse: Parser of the other values.

    Returns:
        The parser.
    """

    def parse_optional(value: object) -> object:
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        try:
            return parse(value)
        except ValueError as error:
            raise ValueError(f"{error}, or none") from None

    return parse_optional


def number_or(word: str, parse: Parser) -> Parser:
    """Accept also one word.

    Args:
        word: The word.
        parse: Parser of the other values.

    Returns:
        The parser.
    """

    def parse_or(value: object) -> object:
        if isinstance(value, str) and value.lower() == word:
            return word
        try:
            return parse(value)
        except ValueError as error:
            raise ValueError(f"{error}, or {word}") from None

    return parse_or


#: What every optimiser understands besides its own hyper-parameters.
COMMON = (
    Option("batch_size", None, optional(integer(1)), "examples per step; none for the problem's own"),
    Option("schedule", "constant", choice(*KINDS), "how the learning rate falls"),
    Option(
        "final_lr",
        0.1,
        number(0.0, 1.0),
        "with a cosine or exponential schedule: last learning rate as a fraction of the first",
        idle=("schedule", ("constant", "step")),
    ),
    Option(
        "lr_drop",
        0.1,
        number(0.0, 1.0, open_low=True),
        "with schedule=step: what the learning rate is multiplied by at each step",
        later=True,
        idle=("schedule", ("constant", "cosine", "exponential")),
    ),
    Option(
        "lr_drop_epochs",
        40.0,
        number(0.0, open_low=True),
        "with schedule=step: epochs from one step to the next",
        later=True,
        idle=("schedule", ("constant", "cosine", "exponential")),
    ),
    Option(
        "crop_padding",
        0,
        integer(0, 1024),
        "images: random crops of the image with so many zeros on each side",
        later=True,
    ),
    Option("mirror", False, flag, "images: half of them mirrored left to right", later=True),
    Option(
        "average", 0.0, number(0.0, 1.0, open_high=True), "decay of the average of iterates that is evaluated; 0: none"
    ),
)

# More than any training set has; what is beyond would not end.
_MOST_BATCHES = 1_000_000

#: Wherever factors can begin before the first step.
WARM_UP = Option(
    "warm_up",
    0,
    integer(0, _MOST_BATCHES),
    "mini-batches whose mean the running factors begin with, before the first step",
    later=True,
)


def own_values(values: Mapping[str, object]) -> dict[str, Any]:
    """Leave out what the runner does for every optimiser alike: batches, schedules, averages, the warm-up.

    Args:
        values: A value for every hyper-parameter.

    Returns:
        Those that the optimiser's constructor takes.
    """
    shared = {option.name for option in (*COMMON, WARM_UP)}
    return {name: value for name, value in values.items() if name not in shared}
