"""The trace-restricted rule as the optimiser that is followed uses it, with its own least trace and expansion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from kronfac.damping import Rule, Shift, TraceRestricted, get_rule
from kronfac.optim import TKFAC

if TYPE_CHECKING:
    import torch

    from kronfac.analysis import LayerDamping
    from kronfac.blocks import Block

NAME, _EXPANDED = "trace_restricted", "trace_restricted, expanded"


class _Half:
    """The rule of convolutions, or that of all other layers, which (5.17) expands.

    Args:
        optimizer: What is asked for the rule whenever it is called.
        expanded: Which of both.
    """

    def __init__(self, optimizer: TKFAC, expanded: bool) -> None:
        self._optimizer, self._expanded = optimizer, expanded
        self.__name__ = _EXPANDED if expanded else NAME

    def __call__(self, block: Block, damping: float, /) -> Shift:
        rules = _by_layer(self._optimizer).values()
        return (max if self._expanded else min)(rules, key=lambda rule: rule.beta)(block, damping)


class OwnRule:
    """What a name of a rule means beside an optimiser.

    A rule is given blocks without the names of their layers: both halves are tried on each, and `rows` keeps one.

    Args:
        optimizer: The optimiser.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        restricted = isinstance(optimizer, TKFAC) and isinstance(optimizer._rule, TraceRestricted)
        self._optimizer = cast(TKFAC, optimizer) if restricted else None

    def rules(self, names: Sequence[str]) -> list[str | Rule]:
        """Put the optimiser's rule in the place of its name.

        Args:
            names: Names of rules.

        Returns:
            What to measure.
        """
        if self._optimizer is None:
            return list(names)
        halves = [_Half(self._optimizer, expanded) for expanded in (False, True)]
        return [rule for name in names for rule in (halves if name == NAME else [name])]

    def rows(self, rows: Sequence[LayerDamping]) -> list[LayerDamping]:
        """Keep of each layer what its own half adds.

        Args:
            rows: What `rules` gave.

        Returns:
            The rows, under the rule's name, the layers of each rule in the order of the network.
        """
        if self._optimizer is None:
            return list(rows)
        expanded = {name for name, rule in _by_layer(self._optimizer).items() if rule is not self._optimizer._rule}
        found: list[LayerDamping] = []
        other = {(row.step, row.layer): row for row in rows if row.rule == _EXPANDED}
        for row in rows:
            if row.rule != _EXPANDED:
                mine = row.rule == NAME and row.layer in expanded
                found.append(replace(other[row.step, row.layer], rule=NAME) if mine else row)
        return found

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
        if self._optimizer is None:
            rule = cast(TraceRestricted, get_rule(NAME))
            return f"{name} damping, ν {rule.nu:g}, β {rule.beta:g}"
        rules = _by_layer(self._optimizer)
        beta, own = max(rule.beta for rule in rules.values()), cast(TraceRestricted, self._optimizer._rule)
        convolves = any(rule is own for rule in rules.values())
        printed = ", as printed" if own.printed else ""
        return f"{name} damping{printed}, ν {own.nu:g}, β {beta:.3g}{' but for convolutions' if convolves else ''}"


def _by_layer(optimizer: TKFAC) -> Mapping[str, TraceRestricted]:
    return cast(Mapping[str, TraceRestricted], optimizer._rules())
