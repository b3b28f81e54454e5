"""Matrix algebra of one curvature block.

A new kind of block is one file here and one entry of `KINDS`.
"""

from __future__ import annotations

from kronfac.blocks.base import Block, Inverse
from kronfac.blocks.coupled import CoupledBlocks, CoupledInverse
from kronfac.blocks.dense import Dense
from kronfac.blocks.diagonal import Diagonal
from kronfac.blocks.diagonal_kronecker import DiagonalKronecker
from kronfac.blocks.eigen_inverse import EigenInverse
from kronfac.blocks.eigen_kronecker import EigenKronecker
from kronfac.blocks.eigenbasis import Eigenbasis
from kronfac.blocks.inverses import DenseInverse, DiagonalKroneckerInverse, KroneckerInverse
from kronfac.blocks.khatri_rao import KhatriRao, KhatriRaoInverse
from kronfac.blocks.kronecker import Kronecker
from kronfac.blocks.kronecker_sum import KroneckerSum
from kronfac.blocks.kronecker_sums import KroneckerSums, read_together
from kronfac.blocks.scaled_kronecker import ScaledKronecker
from kronfac.blocks.shifts import PerFactor, Rescaled, Shift, Uniform
from kronfac.blocks.tridiagonal import Link, Tridiagonal, TridiagonalInverse
from kronfac.blocks.two_term import TwoTermInverse

#: Block classes by the name they are saved under.
KINDS: dict[str, type[Block]] = {
    block.kind: block
    for block in (Kronecker, DiagonalKronecker, ScaledKronecker, KroneckerSum, EigenKronecker, Diagonal, Dense)
}

#: Inverse classes by the name they are saved under.
INVERSES: dict[str, type[Inverse]] = {
    inverse.kind: inverse
    for inverse in (KroneckerInverse, DiagonalKroneckerInverse, DenseInverse, EigenInverse, TwoTermInverse)
}

__all__ = [
    "INVERSES",
    "KINDS",
    "Block",
    "CoupledBlocks",
    "CoupledInverse",
    "Dense",
    "DenseInverse",
    "Diagonal",
    "DiagonalKronecker",
    "DiagonalKroneckerInverse",
    "EigenInverse",
    "EigenKronecker",
    "Eigenbasis",
    "Inverse",
    "KhatriRao",
    "KhatriRaoInverse",
    "Kronecker",
    "KroneckerInverse",
    "KroneckerSum",
    "KroneckerSums",
    "Link",
    "PerFactor",
    "Rescaled",
    "ScaledKronecker",
    "Shift",
    "Tridiagonal",
    "TridiagonalInverse",
    "TwoTermInverse",
    "Uniform",
    "read_together",
]
