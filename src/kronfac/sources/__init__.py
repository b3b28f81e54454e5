"""Sources of cotangents; a new one is one file and one entry here."""

from __future__ import annotations

from kronfac.sources.base import Seed, Source, align_weights, require_examples
from kronfac.sources.empirical import Empirical
from kronfac.sources.exact import Exact
from kronfac.sources.forward_only import ForwardOnly
from kronfac.sources.recursive import Recursive
from kronfac.sources.sample import Sample, not_finite
from kronfac.sources.sampled import RootProbe, Sampled

SOURCES: dict[str, type[Source]] = {
    kind.name: kind for kind in (Sampled, RootProbe, Exact, Empirical, ForwardOnly, Recursive)
}
#: Those that draw samples.
DRAWN = (Sampled.name, RootProbe.name)


def get_source(source: str | Source, samples: int = 1) -> Source:
    """Return a source by name.

    Args:
        source: A name, or a source object, which is returned as it is.
        samples: Number of samples of those that draw, ``"sampled"`` and ``"root"``.

    Returns:
        The source.

    Raises:
        ValueError: The name is unknown, or ``samples`` was given to a source that draws none.
        TypeError: ``source`` is neither.
    """
    if isinstance(source, Source):
        return source
    if not isinstance(source, str):
        raise TypeError(f"source must be a name or a kronfac.sources.Source, not {type(source).__name__}.")
    if source not in SOURCES:
        raise ValueError(f"source={source!r} is unknown; choose one of {sorted(SOURCES)}.")
    kind = SOURCES[source]
    if issubclass(kind, Sampled):
        return kind(samples)
    if samples != 1:
        raise ValueError(f"samples={samples} applies to source='sampled' and 'root', not to {source!r}.")
    return kind()


__all__ = [
    "DRAWN",
    "SOURCES",
    "Empirical",
    "Exact",
    "ForwardOnly",
    "Recursive",
    "RootProbe",
    "Sample",
    "Sampled",
    "Seed",
    "Source",
    "align_weights",
    "get_source",
    "not_finite",
    "require_examples",
]
