"""What approximations of the curvature lose, measured: tables out, no drawing."""

from __future__ import annotations

from kronfac.analysis.spectrum import Eigenvalue, eigenvalues, spectrum

__all__ = ["Eigenvalue", "eigenvalues", "spectrum"]
