"""Damping: how much is added to a block, and where, before it is inverted."""

from __future__ import annotations

from kronfac.blocks.shifts import PerFactor, Shift, Uniform
from kronfac.damping.rules import RULES, Rule, check_damping, exact, factored, get_rule

__all__ = ["RULES", "PerFactor", "Rule", "Shift", "Uniform", "check_damping", "exact", "factored", "get_rule"]
