"""What approximations of the curvature lose, measured: tables out, no drawing."""

from __future__ import annotations

from kronfac.analysis.alignment import Alignment, ConvergenceWarning, alignment, alignment_during_training
from kronfac.analysis.autocorrelation import (
    LayerCorrelations,
    autocorrelation,
    convolution_correlations,
    cross_map_correlation,
    spatial_autocorrelation,
)
from kronfac.analysis.damping import LayerDamping, damping_during_training, damping_of
from kronfac.analysis.during_training import error_during_training
from kronfac.analysis.error import NETWORK, approximation_error
from kronfac.analysis.frames import to_frame
from kronfac.analysis.locations import LocationCorrelation, location_correlation
from kronfac.analysis.matrices import matrices
from kronfac.analysis.method import Method
from kronfac.analysis.rank import monte_carlo_rank
from kronfac.analysis.spectrum import Eigenvalue, eigenvalues, spectrum
from kronfac.analysis.sub_batch import sub_batch_error
from kronfac.analysis.theorem1 import Theorem1Gap, theorem1_factors, theorem1_gap

__all__ = [
    "NETWORK",
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
    "approximation_error",
    "autocorrelation",
    "convolution_correlations",
    "cross_map_correlation",
    "damping_during_training",
    "damping_of",
    "eigenvalues",
    "error_during_training",
    "location_correlation",
    "matrices",
    "monte_carlo_rank",
    "spatial_autocorrelation",
    "spectrum",
    "sub_batch_error",
    "theorem1_factors",
    "theorem1_gap",
    "to_frame",
]
