"""Approximations of a layer's curvature; a new one is one file and one entry here."""

from __future__ import annotations

from kronfac.approximations.base import Approximation, Mean, Statistic
from kronfac.approximations.dense import DenseBlocks
from kronfac.approximations.diagonal import DiagonalBlocks
from kronfac.approximations.ekfac import EKFAC
from kronfac.approximations.joint import JointApproximation, JointStatistic
from kronfac.approximations.kfac import KFAC
from kronfac.approximations.kkfac import KKFAC
from kronfac.approximations.limited import Limited
from kronfac.approximations.nearest import NearestKronecker
from kronfac.approximations.prong import PRONG
from kronfac.approximations.sua import SUA
from kronfac.approximations.tekfac import TEKFAC
from kronfac.approximations.tkfac import TKFAC
from kronfac.approximations.tridiagonal import KFACTridiagonal
from kronfac.approximations.xkfac import XKFAC
from kronfac.approximations.xkfac_trace import TraceMatchedXKFAC

APPROXIMATIONS: dict[str, type[Approximation]] = {
    kind.name: kind
    for kind in (
        KFAC,
        TKFAC,
        EKFAC,
        TEKFAC,
        KFACTridiagonal,
        NearestKronecker,
        SUA,
        PRONG,
        XKFAC,
        TraceMatchedXKFAC,
        KKFAC,
        DiagonalBlocks,
        DenseBlocks,
    )
}


def get_approximation(approximation: str | Approximation) -> Approximation:
    """Return an approximation by name.

    Args:
        approximation: A name, or an object, which is returned as it is.

    Returns:
        The approximation.

    Raises:
        ValueError: The name is unknown.
        TypeError: ``approximation`` is neither.
    """
    if isinstance(approximation, Approximation):
        return approximation
    if not isinstance(approximation, str):
        kind = type(approximation).__name__
        raise TypeError(f"approximation must be a name or a kronfac.approximations.Approximation, not {kind}.")
    if approximation not in APPROXIMATIONS:
        raise ValueError(f"approximation={approximation!r} is unknown; choose one of {sorted(APPROXIMATIONS)}.")
    return APPROXIMATIONS[approximation]()


__all__ = [
    "APPROXIMATIONS",
    "EKFAC",
    "KFAC",
    "KKFAC",
    "PRONG",
    "SUA",
    "TEKFAC",
    "TKFAC",
    "XKFAC",
    "Approximation",
    "DenseBlocks",
    "DiagonalBlocks",
    "JointApproximation",
    "JointStatistic",
    "KFACTridiagonal",
    "Limited",
    "Mean",
    "NearestKronecker",
    "Statistic",
    "TraceMatchedXKFAC",
    "get_approximation",
]
