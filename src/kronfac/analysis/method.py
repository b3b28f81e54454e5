"""A curvature to analyse: approximation, source and damping rule, by names or as objects."""

from __future__ import annotations

from dataclasses import dataclass

from kronfac.approximations import Approximation, get_approximation
from kronfac.damping import Rule, get_rule
from kronfac.sources import Source, get_source


@dataclass(frozen=True)
class Method:
    """What a curvature estimate is made of.

    Attributes:
        approximation: Name or object.
        source: Name or object.
        rule: Damping rule, by name or as a function.

    Raises:
        ValueError: If a name is unknown, or the approximation cannot use the source.
        TypeError: If something is of the wrong kind.
    """

    approximation: str | Approximation = "kfac"
    source: str | Source = "sampled"
    rule: str | Rule = "exact"

    def __post_init__(self) -> None:
        """Validate."""
        get_approximation(self.approximation).check(get_source(self.source))
        get_rule(self.rule)

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read ``approximation:source`` or ``approximation:source:rule``, such as ``"kfac:exact:factored"``.

        Args:
            text: The text; what is left out is ``sampled`` and ``exact``.

        Returns:
            The method.

        Raises:
            ValueError: If it has another form, or a name is unknown.
        """
        parts = [part.strip() for part in text.split(":")]
        if not all(parts) or len(parts) > 3:
            raise ValueError(
                f"a method is approximation:source or approximation:source:rule, such as kfac:exact, got {text!r}"
            )
        return cls(*parts)

    @property
    def name(self) -> str:
        """``approximation:source``, and the damping rule where it is not ``"exact"``."""
        approximation = get_approximation(self.approximation).name
        source = self.source if isinstance(self.source, str) else self.source.name
        rule = self.rule if isinstance(self.rule, str) else getattr(self.rule, "__name__", type(self.rule).__name__)
        return f"{approximation}:{source}" + ("" if rule == "exact" else f":{rule}")


def as_method(method: str | Method) -> Method:
    """Give a method, parsed if it is a text.

    Args:
        method: A method or its text.

    Returns:
        The method.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise TypeError(f"a method is a text such as 'kfac:exact' or a Method, got {type(method).__name__}")
    return Method.parse(method)
