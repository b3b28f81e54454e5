"""The optimiser behind a wrapper that imitates its class and hands on the attributes that it lacks."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast


class Itself(Protocol):
    """An optimiser that tells itself from a wrapper."""

    _itself: Callable[[], Any]


P = ParamSpec("P")
R = TypeVar("R")
Own = TypeVar("Own", bound=Itself)


def on_itself(method: Callable[Concatenate[Own, P], R]) -> Callable[Concatenate[Own, P], R]:
    """Let a method that sets attributes set those of the optimiser, whoever it is called on.

    Lightning and Fabric wrap an optimiser in an object whose class is made to inherit from the optimiser's, so that its
    methods run on the wrapper: what they read is handed on to the optimiser, but what they set stays on the wrapper,
    and is lost.

    Args:
        method: The method.

    Returns:
        The same on the optimiser itself.
    """

    @wraps(method)
    def call(self: Own, /, *args: P.args, **kwargs: P.kwargs) -> R:
        own = self._itself()  # that of the optimiser, through the wrapper
        if own is self:
            return method(self, *args, **kwargs)
        found: R = getattr(own, method.__name__)(*args, **kwargs)
        return found

    return cast(Callable[Concatenate[Own, P], R], call)
