"""What approximations of the curvature lose, measured: tables out, no drawing."""

from __future__ import annotations

from kronfac.analysis.alignment import Alignment, ConvergenceWarning, alignment, alignment_during_training
from kronfac.analysis.autocorrelation import (
    LayerCorrelations,
    convolution_correlations,
    cross_map_correlation,
    spatial_autocorrelation,
)
from kronfac.analysis.damping import LayerDamping, damping_during_training, damping_of
from kronfac.analysis.locations import LocationCorrelation, location_correlation
from kronfac.analysis.method import Method
from kronfac.analysis.rank import monte_carlo_rank
from kronfac.analysis.spectrum import Eigenvalue, eigenvalues, spectrum
from kronfac.analysis.theorem1 import Theorem1Gap, theorem1_factors, theorem1_gap

__all__ = [
    "Alignment",
    "ConvergenceWarning",
    "Eigenvalue",
    "LayerCorrelations",
    "LayerDamping",
    "LocationCorrelation",
    "Method",
    "Theorem1Gap",
    "alignment",
    "alignment_during_training",
    "convolution_correlations",
    "cross_map_correlation",
    "damping_during_training",
    "damping_of",
    "eigenvalues",
    "location_correlation",
    "monte_carlo_rank",
    "spatial_autocorrelation",
    "spectrum",
    "theorem1_factors",
    "theorem1_gap",
]
