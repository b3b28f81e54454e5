"""Sources by the names that the command line takes; ``root`` is ``Sampled(probe="root")``, which has no name else."""

from __future__ import annotations

from collections.abc import Sequence

from kronfac.experiments.errors import ExperimentError, UnknownNameError
from kronfac.sources import SOURCES, Sampled, Source, get_source

ROOT = "root"


class RootProbe(Sampled):
    """``Sampled(samples, probe="root")`` with a name of its own, for tables with rows of both probes.

    Args:
        samples: Number of pulls per forward pass.
    """

    name = ROOT

    def __init__(self, samples: int = 1) -> None:
        super().__init__(samples, "root")


def named_sources(names: Sequence[str], samples: int = 1) -> list[Source]:
    """Look sources up.

    Args:
        names: Keys of `kronfac.sources.SOURCES`, or ``"root"``.
        samples: Samples of those that draw.

    Returns:
        The sources.

    Raises:
        ExperimentError: If a name occurs twice, or samples are given and none of the sources draws any.
        UnknownNameError: If a name is unknown.
    """
    for name in names:
        if name not in (*SOURCES, ROOT):
            raise UnknownNameError("source", name, (*SOURCES, ROOT))
        if list(names).count(name) > 1:
            raise ExperimentError(f"source {name!r} is named twice")
    drawn = {Sampled.name: Sampled, ROOT: RootProbe}
    if samples != 1 and not drawn.keys() & set(names):
        raise ExperimentError(f"samples={samples} is for the sources {' and '.join(drawn)}, not for {', '.join(names)}")
    return [drawn[name](samples) if name in drawn else get_source(name) for name in names]


def named_source(name: str, samples: int = 1) -> Source:
    """Look one source up.

    Args:
        name: As for `named_sources`.
        samples: Samples, if it draws any.

    Returns:
        The source.
    """
    return named_sources([name], samples)[0]
