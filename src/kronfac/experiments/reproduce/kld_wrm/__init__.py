"""Puiu (2022), *Rethinking Exponential Averaging of the Fisher*: K-FAC, SO-, Q- and QE-KLD-WRM on MNIST."""

from __future__ import annotations

from kronfac.experiments.reproduce.kld_wrm.rows import ROWS, Row
from kronfac.experiments.reproduce.kld_wrm.study import DATA, Outcome, make_study, reproduce
from kronfac.experiments.reproduce.kld_wrm.table import as_rows, view

__all__ = ["DATA", "ROWS", "Outcome", "Row", "as_rows", "make_study", "reproduce", "view"]
