"""Cheaper forms of a step for wide linear layers, where a workload has any: rounded products, and rows as gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from kronfac.experiments.bench.steps import gradients_of, make_kfac, step
from kronfac.experiments.bench.workloads import Workload
from kronfac.layers import LayerAdapter, adapt_model
from kronfac.linalg.rounded import pays_on
from kronfac.optim import KFAC, reduced, rows
from kronfac.optim.directions import directions


def wide_parts(work: Workload, optimizer: KFAC, gradients: Mapping[str, Tensor]) -> dict[str, Callable[[], object]]:
    """Make the parts that are to be had for wide layers.

    Args:
        work: The workload.
        optimizer: Its KFAC, which has inverses.
        gradients: By parameter name.

    Returns:
        ``"precondition, bfloat16"``, the directions of these gradients, and ``"with precondition by rows"``, a forward
        and backward that keeps rows with the directions of these; nothing where no layer is wide enough.
    """
    found: dict[str, Callable[[], object]] = {}
    options = wide_options(work)
    if "bfloat16 products" in options:
        rounded = reduced.RoundedDirections()
        adapters, inverses = optimizer._estimator.adaptation.adapters, dict(optimizer._inverses)
        found["precondition, bfloat16"] = lambda: directions(adapters, inverses, gradients, rounded.multiply)
    if "rows" in options:
        twin = replace(work, model=copy.deepcopy(work.model))
        other = make_kfac(twin, **options["rows"])
        step(twin, other)
        other._steps = 1  # nothing is due, and no forward is paused, in which no rows are kept
        found["with precondition by rows"] = lambda: _by_rows(twin, other)
    return found


def _by_rows(work: Workload, optimizer: KFAC) -> object:
    optimizer.zero_grad()
    work.forward().backward()
    return optimizer._directions(gradients_of(work))


def wide_options(work: Workload) -> dict[str, dict[str, Any]]:
    """Options of KFAC for wide layers that a workload can have.

    Args:
        work: The workload.

    Returns:
        Options by their name in tables.
    """
    if work.approximation != "kfac":
        return {}
    layers = adapt_model(work.model).adapters.values()
    known: dict[str, tuple[Callable[[LayerAdapter], bool], dict[str, Any]]] = {
        "bfloat16 products": (reduced.fits, {"products": "bfloat16"}),
        "rows": (rows.fits, {"gradients": "rows"}),
    }
    if not pays_on(work.device):
        del known["bfloat16 products"]
    return {name: options for name, (fits, options) in known.items() if any(map(fits, layers))}
