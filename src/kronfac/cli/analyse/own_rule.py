"""The trace-restricted rule as the optimiser that is followed uses it, with its own least trace and expansion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, cast

from kronfac.damping import TraceRestricted, get_rule
from kronfac.optim import TKFAC

if TYPE_CHECKING:
    import torch

    from kronfac.analysis.damping import AnyRule

NAME = "trace_restricted"


class _Followed(Mapping[str, TraceRestricted]):
    """An optimiser's rule of each layer, as it is whenever it is asked for.

    Args:
        optimizer: The optimiser, whose rule is `TraceRestricted`.
    """

    __name__ = NAME

    def __init__(self, optimizer: TKFAC) -> None:
        self._optimizer = optimizer

    @property
    def _rules(self) -> Mapping[str, TraceRestricted]:
        return cast(Mapping[str, TraceRestricted], self._optimizer._rules())

    def __getitem__(self, layer: str) -> TraceRestricted:
        return self._rules[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)


class OwnRule:
    """What a name of a rule means beside an optimiser.

    Args:
        optimizer: The optimiser.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        rule = optimizer._rule if isinstance(optimizer, TKFAC) else None
        self._rule = rule if isinstance(rule, TraceRestricted) else None
        self._followed = _Followed(cast(TKFAC, optimizer))

    def of(self, name: str) -> AnyRule:
        """Put the optimiser's rule in the place of its name.

        Args:
            name: Name of a rule.

        Returns:
            What to measure.
        """
        return name if self._rule is None or name != NAME else self._followed

    def title(self, name: str, damping: float) -> str:
        """Say what was added.

        Args:
            name: Name of a rule.
            damping: The damping.

        Returns:
            The rule and its numbers, an expansion being the present one.
        """
        if name != NAME:
            return f"{name} damping {damping:g}"
        if self._rule is None:
            rule = cast(TraceRestricted, get_rule(NAME))
            return f"{name} damping, ν {rule.nu:g}, β {rule.beta:g}"
        rules = self._followed.values()
        beta, convolves = max(rule.beta for rule in rules), any(rule is self._rule for rule in rules)
        printed = ", as printed" if self._rule.printed else ""
        return (
            f"{name} damping{printed}, ν {self._rule.nu:g}, β {beta:.3g}{' but for convolutions' if convolves else ''}"
        )
