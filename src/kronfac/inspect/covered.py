"""``coverage``: what each parameter of a model gets, and what it costs, before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from kronfac.approximations import Approximation, get_approximation
from kronfac.approximations.base import statistics_dtype
from kronfac.approximations.joint import require_per_layer
from kronfac.eager import eager_root
from kronfac.inspect.description import Description, describe, start
from kronfac.inspect.text import frame, plain, size, table
from kronfac.layers import LayerAdapter, adapt_model
from kronfac.measuring import couples_examples

DAMPING_RULES = ("factored", "exact", "normal", "trace_restricted")


@dataclass(frozen=True)
class ParameterCoverage:
    """What one parameter gets.

    Attributes:
        parameter: Its full name.
        layer: Name of the module that owns it; empty for the model itself.
        layer_type: Type of that module.
        shape: Its shape.
        entries: Its number of entries.
        block: Kind of block: ``"kronecker"``, ``"kronecker sum"``, ``"kronecker, diagonal input"``,
            ``"eigen-kronecker"`` (likewise), ``"dense"``, ``"dense per unit"``, ``"dense per group"``, ``"diagonal"``,
            ``"frozen"`` or ``"none"``. Parameters of one layer share it.
        factors: Sizes of the layer's factors: input factor ``(x)`` output factor, with the number of groups or units.
        factor_bytes: Memory of the layer's statistics; counted at the layer's first parameter with curvature and 0 at
            the others, so that sums over rows are right.
        inverse_bytes: Memory of their inverses, counted alike.
        state: ``"exact"``: the entries kept are those of the Gauss-Newton (in expectation over sampled labels);
            ``"approximate"``; or ``"none"``.
        reason: Why.
    """

    parameter: str
    layer: str
    layer_type: str
    shape: tuple[int, ...]
    entries: int
    block: str
    factors: str
    factor_bytes: int
    inverse_bytes: int
    state: str
    reason: str


class CoverageReport:
    """What `coverage` found; ``print(report)`` gives a table.

    Args:
        rows: A row for each parameter.
        settings: What was asked for, by name.
        largest: Width of the largest factor and its layer; None without factors.
        snapshot_memory: Bytes of copies of the trainable parameters.

    Attributes:
        rows: A `ParameterCoverage` for each parameter, frozen ones included, in the model's order.
        settings: Approximation, sharing, norm, damping rule and number of snapshots.
        largest: Width of the largest factor and its layer; None without factors.
        snapshot_memory: Bytes of copies of the trainable parameters.
    """

    def __init__(
        self,
        rows: tuple[ParameterCoverage, ...],
        settings: Mapping[str, str | int],
        largest: tuple[int, str] | None,
        snapshot_memory: int = 0,
    ) -> None:
        self.rows = rows
        self.settings = dict(settings)
        self.largest = largest
        self.snapshot_memory = snapshot_memory

    @property
    def covered(self) -> tuple[str, ...]:
        """Names of the parameters with a block."""
        return tuple(row.parameter for row in self.rows if row.state != "none")

    @property
    def uncovered(self) -> dict[str, str]:
        """Names of the trainable parameters without a block, and the reason why."""
        return {row.parameter: row.reason for row in self.rows if row.state == "none" and row.block != "frozen"}

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the parameters with ``requires_grad=False``."""
        return tuple(row.parameter for row in self.rows if row.block == "frozen")

    @property
    def fraction(self) -> float:
        """Entries with a block over entries of trainable parameters; 0 where there are none."""
        covered = sum(row.entries for row in self.rows if row.state != "none")
        return covered / max(1, sum(row.entries for row in self.rows if row.block != "frozen"))

    @property
    def factor_memory(self) -> int:
        """Bytes of all statistics."""
        return sum(row.factor_bytes for row in self.rows)

    @property
    def inverse_memory(self) -> int:
        """Bytes of all inverses."""
        return sum(row.inverse_bytes for row in self.rows)

    @property
    def memory(self) -> int:
        """Bytes of statistics, inverses and snapshots together."""
        return self.factor_memory + self.inverse_memory + self.snapshot_memory

    @property
    def table(self) -> Any:
        """The rows as a ``pandas.DataFrame``; needs pandas."""
        return frame([asdict(row) for row in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """Give everything as plain data.

        Returns:
            Lists, texts and numbers, fit for ``json.dumps``.
        """
        totals = {
            "covered_fraction": self.fraction,
            "trainable_entries": sum(row.entries for row in self.rows if row.block != "frozen"),
            "frozen_entries": sum(row.entries for row in self.rows if row.block == "frozen"),
            "factor_bytes": self.factor_memory,
            "inverse_bytes": self.inverse_memory,
            "snapshot_bytes": self.snapshot_memory,
            "memory_bytes": self.memory,
            "largest_factor": self.largest and {"width": self.largest[0], "layer": self.largest[1]},
        }
        return plain({"settings": self.settings, "totals": totals, "rows": [asdict(row) for row in self.rows]})

    def __str__(self) -> str:
        reasons = list(dict.fromkeys(row.reason for row in self.rows))
        cells = [
            [
                row.parameter,
                row.layer_type,
                "x".join(map(str, row.shape)) or "scalar",
                row.block,
                row.factors if row.factor_bytes else "",
                size(row.factor_bytes + row.inverse_bytes) if row.factor_bytes else "",
                f"{row.state} [{reasons.index(row.reason) + 1}]",
            ]
            for row in self.rows
        ]
        headings = ["parameter", "layer", "shape", "block", "factors", "memory", "state"]
        notes = [f"[{number}] {reason}" for number, reason in enumerate(reasons, 1)]
        return "\n".join([table(headings, cells, numbers=["memory"]), "", *notes, "", *self._totals()])

    def _totals(self) -> list[str]:
        trainable = [row for row in self.rows if row.block != "frozen"]
        lines = [
            f"covered: {self.fraction:.1%} of {sum(row.entries for row in trainable):,} trainable parameters "
            f"({len(self.covered)} of {len(trainable)} tensors)"
        ]
        if self.frozen:
            entries = sum(row.entries for row in self.rows if row.block == "frozen")
            lines[0] += f"; {entries:,} more are frozen"
        if self.largest is not None:
            copies = f" + snapshots {size(self.snapshot_memory)}" if self.snapshot_memory else ""
            lines.append(
                f"memory: factors {size(self.factor_memory)} + inverses {size(self.inverse_memory)}{copies} = "
                f"{size(self.memory)}; largest factor: {self.largest[0]} wide, of {self.largest[1]!r}"
            )
        return lines

    def __repr__(self) -> str:
        return f"CoverageReport({len(self.covered)} of {len(self.rows)} parameters, {size(self.memory)})"


def coverage(
    model: nn.Module,
    *,
    approximation: str | Approximation = "kfac",
    sharing: str = "expand",
    norm: str = "unitwise",
    damping_rule: str = "factored",
    dtype: torch.dtype | None = None,
    snapshots: int = 0,
) -> CoverageReport:
    """Report for every parameter which block it gets, how large that is, and whether it is exact; runs nothing.

    A block is called exact if the entries it keeps are those of the Gauss-Newton matrix, in expectation over sampled
    labels. A model in train mode may differ from one in eval mode (batch norm): the report is for the mode it is in.
    Whether a layer is called once in a forward pass, as it must be, only a forward pass can tell: see `verify`.

    Args:
        model: The model.
        approximation: Name or object, as for `kronfac.estimate`.
        sharing: ``"expand"`` or ``"reduce"``.
        norm: ``"unitwise"`` or ``"full"`` blocks of normalisation layers.
        damping_rule: How the inverses that are counted are damped: ``"factored"`` keeps two inverse factors,
            ``"exact"`` their eigenvectors and all products of their eigenvalues; ``"normal"`` and
            ``"trace_restricted"`` are as ``"factored"``.
        dtype: float32 or float64, to count memory in; by default float64 for float64 layers and float32 for others.
        snapshots: Copies of the trainable parameters that the optimiser keeps: ``n_cap − 1`` for
            `kronfac.optim.KLDWRM` with ``variant="qe"``, whose old networks they are.

    Returns:
        The report.

    Raises:
        ValueError: An option is unknown, or no parameter is trainable.
    """
    if damping_rule not in DAMPING_RULES:
        raise ValueError(f"damping_rule={damping_rule!r} is unknown; choose one of {DAMPING_RULES}.")
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"dtype={dtype!r} is not supported: statistics are kept in torch.float32 or torch.float64.")
    if isinstance(snapshots, bool) or not isinstance(snapshots, int) or snapshots < 0:
        raise ValueError(f"snapshots={snapshots!r} must be an integer >= 0.")
    model, method = eager_root(model), get_approximation(approximation)
    require_per_layer(method, "coverage")
    adaptation = adapt_model(model, sharing=sharing, norm=norm)
    coupled = couples_examples(model) and not method.couples_examples
    rows: dict[str, ParameterCoverage] = {}
    largest: list[tuple[int, str]] = []
    for name, adapter in adaptation.adapters.items():
        try:
            description = describe(start(method, adapter))
        except ValueError as error:
            reason = f"refused: {error}"
            rows |= {key: _row(model, key, "none", reason) for key in adapter.parameter_names}
            continue
        entry = (dtype or statistics_dtype(adapter)).itemsize
        rows |= _layer_rows(model, adapter, description, entry, damping_rule, coupled)
        largest.append((max(description.widths), name))
    for key, reason in adaptation.uncovered.items():
        rows[key] = _row(model, key, "none", f"{reason}; trained on the plain gradient")
    for key in adaptation.frozen:
        rows[key] = _row(model, key, "frozen", "frozen (requires_grad=False)")
    settings: dict[str, str | int] = {
        "approximation": method.name,
        "sharing": sharing,
        "norm": norm,
        "damping_rule": damping_rule,
        "snapshots": snapshots,
    }
    ordered = tuple(rows[name] for name, _ in model.named_parameters())
    copied = snapshots * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return CoverageReport(ordered, settings, max(largest, key=lambda pair: pair[0], default=None), copied)


def _layer_rows(
    model: nn.Module, adapter: LayerAdapter, description: Description, entry: int, rule: str, coupled: bool
) -> dict[str, ParameterCoverage]:
    """Rows of a layer's parameters; memory at the first."""
    assumed = list(description.assumes)
    if coupled:
        assumed.append("examples as independent, though batch norm in train mode couples them")
    state, reason = ("approximate", "; ".join(assumed)) if assumed else ("exact", description.holds)
    inverse = description.exact_inverse if rule == "exact" else description.inverse
    rows = {}
    for index, key in enumerate(adapter.parameter_names):
        memory = (0, 0) if index else (description.entries * entry, inverse * entry)
        rows[key] = _row(model, key, description.kind, reason, state, description.factors, memory)
    return rows


def _row(
    model: nn.Module,
    key: str,
    block: str,
    reason: str,
    state: str = "none",
    factors: str = "",
    memory: tuple[int, int] = (0, 0),
) -> ParameterCoverage:
    layer = key.rpartition(".")[0]
    # Not by get_parameter, which scripted modules do not support.
    parameter: nn.Parameter = attrgetter(key)(model)
    kind = type(attrgetter(layer)(model) if layer else model).__name__
    return ParameterCoverage(
        key, layer, kind, tuple(parameter.shape), parameter.numel(), block, factors, *memory, state, reason
    )
