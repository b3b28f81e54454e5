"""The errors a person can cause: each is one sentence that names the thing and says what to do."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import TypeVar

_Known = TypeVar("_Known")


class ExperimentError(ValueError):
    """Bad input to an experiment: an unknown name, a value out of range, an unusable file or folder."""


class UnknownNameError(ExperimentError):
    """A name that is not registered; the message lists those that are.

    Args:
        kind: What was asked for, such as ``"problem"``.
        name: The name given.
        known: The names there are.
    """

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        known = list(known)
        super().__init__(f"unknown {kind} {name!r}; known: {', '.join(known)}{did_you_mean(name, known)}")


def look_up(kind: str, name: str, known: Mapping[str, _Known]) -> _Known:
    """Take what is registered under a name.

    Args:
        kind: What is asked for, such as ``"problem"``.
        name: The name.
        known: What there is, by name.

    Returns:
        What is registered.

    Raises:
        UnknownNameError: If there is nothing of that name; the message lists the names there are.
    """
    if name not in known:
        raise UnknownNameError(kind, name, known)
    return known[name]


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Suggest the name that was probably meant.

    Args:
        name: The name given.
        known: The names there are.

    Returns:
        ``"; did you mean ...?"``, or nothing where none is alike.
    """
    close = difflib.get_close_matches(str(name), list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


class DatasetError(ExperimentError):
    """A dataset that is absent, damaged, or not what its name promises."""


class CheckpointError(ExperimentError):
    """A checkpoint that cannot be read, or that belongs to something else."""


def reason_of(error: Exception) -> str:
    """Say in one line why something failed.

    Args:
        error: What was raised.

    Returns:
        The first line of its text; its type where it has none.
    """
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def need(module: str, extra: str) -> ModuleType:
    """Import an optional library on first use.

    Args:
        module: The module's import name, such as ``"pyarrow.parquet"``.
        extra: The extra of kronfac that installs it.

    Returns:
        The imported module.

    Raises:
        ExperimentError: If it is not installed; the message gives the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExperimentError(
            f"this needs {module.split('.')[0]}, which could not be imported ({error}); "
            f"install it with: pip install 'kronfac[{extra}]'"
        ) from error
