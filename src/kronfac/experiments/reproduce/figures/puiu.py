"""Puiu (2022), KLD-WRM: a study of its own, see ``kronfac reproduce kld-wrm``."""

from __future__ import annotations

from kronfac.experiments.reproduce.figures.base import Figure

FIGURES = (
    Figure(
        key="puiu-1",
        paper="Puiu (2022)",
        where="Figures 1 and 2, Table 1",
        shows="accuracy and loss of K-FAC and of SO-, Q- and QE-KLD-WRM on MNIST, ten runs each",
        found="the KLD-WRM variants reach 98 % more often than K-FAC and end higher",
        commands=("reproduce kld-wrm --rows best",),
        small=("reproduce kld-wrm --rows so-0.5 --data digits --runs 1 --epochs 2",),
        differs="see the page on KLD-WRM",
    ),
)
