"""Cheaper forms of a step for wide linear layers, where a workload has any: rounded products, and rows as gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kronfac.experiments.bench.steps import directions_of, gradients_of, make_kfac, step
from kronfac.experiments.bench.workloads import Workload
from kronfac.layers import LayerAdapter, adapt_model
from kronfac.linalg.rounded import pays_on
from kronfac.optim import KFAC, reduced, rows
from kronfac.optim.directions import directions

#: Parts that keep rows, by their optimiser's options.
BY_ROWS = {"rows": "precondition by rows", "rows, bfloat16 products": "precondition by rows, bfloat16"}


def wide_parts(work: Workload, optimizer: KFAC, gradients: Mapping[str, Tensor]) -> dict[str, Callable[[], object]]:
    """Make the parts that are to be had for wide layers.

    Args:
        work: The workload.
        optimizer: Its KFAC, which has inverses.
        gradients: By parameter name.

    Returns:
        ``"precondition, bfloat16"``, the directions of these gradients, and ``"with precondition by rows"``, a forward
        and backward that keeps rows with the directions of these, in bfloat16 too; nothing where no layer is wide
        enough.
    """
    found: dict[str, Callable[[], object]] = {}
    options = wide_options(work)
    if "bfloat16 products" in options:
        rounded = reduced.RoundedDirections()
        adapters, inverses = optimizer._estimator.adaptation.adapters, dict(optimizer._inverses)

        @torch.no_grad()
        def round_them() -> object:
            return directions(adapters, inverses, gradients, rounded.multiply)

        found["precondition, bfloat16"] = round_them
    for name, part in BY_ROWS.items():
        if name in options:
            found[f"with {part}"] = _by_rows(work, options[name])
    return found


def _by_rows(work: Workload, options: Mapping[str, Any]) -> Callable[[], object]:
    twin = replace(work, model=copy.deepcopy(work.model))
    optimizer = make_kfac(twin, **options)
    step(twin, optimizer)
    optimizer._steps = 1  # nothing is due, and no forward is paused, in which no rows are kept

    def run() -> object:
        optimizer.zero_grad()
        twin.forward().backward()
        return directions_of(optimizer, gradients_of(twin))

    return run


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
        "rows, bfloat16 products": (reduced.fits, {"gradients": "rows", "products": "bfloat16"}),
    }
    if not pays_on(work.device):
        known = {"rows": known["rows"]}
    return {name: options for name, (fits, options) in known.items() if any(map(fits, layers))}
