"""Pictures: functions that draw a table on matplotlib axes and return the axes.

They take pandas frames, or anything with named columns, and know nothing of how the numbers came about.
"""

from __future__ import annotations

from kronfac.plots.accuracy import accuracy_matrices
from kronfac.plots.alignment import alignment_curves, alignment_panels
from kronfac.plots.autocorrelation import ImageRow, correlation_images
from kronfac.plots.bars import bars
from kronfac.plots.curves import training_curves
from kronfac.plots.damping import damping_curves, damping_panels
from kronfac.plots.diagnostics import step_reports
from kronfac.plots.errors import error_curves, layer_errors
from kronfac.plots.grids import grid_profile
from kronfac.plots.matrices import matrix_images
from kronfac.plots.rank import rank_curves
from kronfac.plots.runs import run_lines
from kronfac.plots.scaling import scaling_panels
from kronfac.plots.scatter import scatters
from kronfac.plots.spectrum import spectrum_panels
from kronfac.plots.style import COLOURS, colour_of, new_axes

__all__ = [
    "COLOURS",
    "ImageRow",
    "accuracy_matrices",
    "alignment_curves",
    "alignment_panels",
    "bars",
    "colour_of",
    "correlation_images",
    "damping_curves",
    "damping_panels",
    "error_curves",
    "grid_profile",
    "layer_errors",
    "matrix_images",
    "new_axes",
    "rank_curves",
    "run_lines",
    "scaling_panels",
    "scatters",
    "spectrum_panels",
    "step_reports",
    "training_curves",
]
