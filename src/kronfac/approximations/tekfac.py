"""TEKFAC: second moments re-estimated in the eigenbasis of TKFAC's factors."""

from __future__ import annotations

from kronfac.approximations.ekfac import EKFAC
from kronfac.approximations.tkfac import TKFAC


class TEKFAC(EKFAC):
    """EKFAC over TKFAC: its eigenvectors, and the exact diagonal in their basis (Gao et al. 2020, arXiv 2011.13609).

    Of all matrices with the eigenvectors of TKFAC's block it is the nearest one to the exact block in Frobenius norm.
    """

    name = "tekfac"

    def __init__(self) -> None:
        super().__init__(TKFAC())
