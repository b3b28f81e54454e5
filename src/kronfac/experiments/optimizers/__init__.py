"""Optimisers by name. A new one is one file with a ``FAMILY`` of specifications, and one line here."""

from __future__ import annotations

from kronfac.experiments.errors import look_up
from kronfac.experiments.optimizers import adaptive, ekfac, first_order, kfac, kldwrm, soap, tkfac
from kronfac.experiments.optimizers.base import OptimizerSpec

#: Every optimiser, by name.
OPTIMIZERS: dict[str, OptimizerSpec] = {
    spec.name: spec
    for family in (
        first_order.FAMILY,
        kfac.FAMILY,
        adaptive.FAMILY,
        ekfac.FAMILY,
        tkfac.FAMILY,
        kldwrm.FAMILY,
        soap.FAMILY,
    )
    for spec in family
}


def get_optimizer(name: str) -> OptimizerSpec:
    """Look an optimiser up.

    Args:
        name: A key of `OPTIMIZERS`.

    Returns:
        Its specification.

    Raises:
        UnknownNameError: If there is none of that name; the message lists those there are.
    """  # noqa: DOC502
    return look_up("optimiser", name, OPTIMIZERS)


__all__ = ["OPTIMIZERS", "OptimizerSpec", "get_optimizer"]
