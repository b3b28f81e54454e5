"""Problems by name. A new one is one file with a ``FAMILY`` of problems, and one line here."""

from __future__ import annotations

from kronfac.experiments.errors import look_up
from kronfac.experiments.problems import autoencoders, convolutional, digits, logistic, physics, pooled, puiu, residual
from kronfac.experiments.problems.base import Data, Problem

__all__ = ["PROBLEMS", "Data", "Problem", "get_problem"]

#: Every problem, by name.
PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for family in (
        digits.FAMILY,
        autoencoders.FAMILY,
        logistic.FAMILY,
        convolutional.FAMILY,
        residual.FAMILY,
        pooled.FAMILY,
        puiu.FAMILY,
        physics.FAMILY,
    )
    for problem in family
}


def get_problem(name: str) -> Problem:
    """Look a problem up.

    Args:
        name: A key of `PROBLEMS`.

    Returns:
        The problem.

    Raises:
        UnknownNameError: If there is none of that name; the message lists those there are.
    """  # noqa: DOC502
    return look_up("problem", name, PROBLEMS)
