"""Checks before anything is trusted: what each parameter gets, and whether the curvature is right on your own model."""

from __future__ import annotations

from kronfac.inspect.covered import CoverageReport, ParameterCoverage, coverage
from kronfac.inspect.verification import verify
from kronfac.inspect.verified import LayerCheck, VerificationError, VerificationReport

__all__ = [
    "CoverageReport",
    "LayerCheck",
    "ParameterCoverage",
    "VerificationError",
    "VerificationReport",
    "coverage",
    "verify",
]
