"""Sources by the names that the command line takes, and samples where one draws any."""

from __future__ import annotations

from collections.abc import Sequence

from kronfac.experiments.errors import ExperimentError, UnknownNameError
from kronfac.sources import DRAWN, SOURCES, Source, get_source


def named_sources(names: Sequence[str], samples: int = 1) -> list[Source]:
    """Look sources up.

    Args:
        names: Keys of `kronfac.sources.SOURCES`.
        samples: Samples of those that draw.

    Returns:
        The sources.

    Raises:
        ExperimentError: If a name occurs twice, or samples are given and none of the sources draws any.
        UnknownNameError: If a name is unknown.
    """
    for name in names:
        if name not in SOURCES:
            raise UnknownNameError("source", name, SOURCES)
        if list(names).count(name) > 1:
            raise ExperimentError(f"source {name!r} is named twice")
    if samples != 1 and not set(DRAWN) & set(names):
        raise ExperimentError(f"samples={samples} is for the sources {' and '.join(DRAWN)}, not for {', '.join(names)}")
    return [get_source(name, samples if name in DRAWN else 1) for name in names]


def named_source(name: str, samples: int = 1) -> Source:
    """Look one source up.

    Args:
        name: As for `named_sources`.
        samples: Samples, if it draws any.

    Returns:
        The source.
    """
    return named_sources([name], samples)[0]
