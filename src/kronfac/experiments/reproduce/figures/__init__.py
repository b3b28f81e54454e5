"""Figures of the source papers as commands of ``kronfac``: a new one is an entry in the file of its paper."""

from __future__ import annotations

from kronfac.experiments.errors import look_up
from kronfac.experiments.reproduce.figures import botev, gao, grosse, lee, puiu
from kronfac.experiments.reproduce.figures.base import Figure

__all__ = ["FIGURES", "Figure", "get_figure"]

#: Every figure, by key.
FIGURES: dict[str, Figure] = {
    figure.key: figure
    for paper in (grosse.FIGURES, gao.FIGURES, botev.FIGURES, puiu.FIGURES, lee.FIGURES)
    for figure in paper
}


def get_figure(key: str) -> Figure:
    """Look a figure up.

    Args:
        key: A key of `FIGURES`.

    Returns:
        The figure.

    Raises:
        UnknownNameError: If there is none of that key; the message lists those there are.
    """  # noqa: DOC502
    return look_up("figure", key, FIGURES)
