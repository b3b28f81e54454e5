"""Damping: how much is added to a block, and where, before it is inverted."""

from __future__ import annotations

from kronfac.blocks.shifts import PerFactor, Rescaled, Shift, Uniform
from kronfac.damping.rules import RULES, EachFactor, Rule, check_damping, exact, factored, get_rule
from kronfac.damping.trace_restricted import TraceRestricted, expansion, normal

RULES |= {"normal": normal, "trace_restricted": TraceRestricted()}

__all__ = [
    "RULES",
    "EachFactor",
    "PerFactor",
    "Rescaled",
    "Rule",
    "Shift",
    "TraceRestricted",
    "Uniform",
    "check_damping",
    "exact",
    "expansion",
    "factored",
    "get_rule",
    "normal",
]
