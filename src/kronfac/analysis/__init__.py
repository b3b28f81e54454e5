"""What approximations of the curvature lose, measured: tables out, no drawing."""

from __future__ import annotations

from kronfac.analysis.rank import monte_carlo_rank
from kronfac.analysis.spectrum import Eigenvalue, eigenvalues, spectrum

__all__ = ["Eigenvalue", "eigenvalues", "monte_carlo_rank", "spectrum"]
