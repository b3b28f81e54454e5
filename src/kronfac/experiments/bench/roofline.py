"""Floors of the parts' time: what they must multiply and move, over what the machine was measured to do.

FLOPs are counted as two for each multiplication and addition. Statistics: those of the library's own calls, seen as
they are made (pull of the cotangents and second moments), and beside them ``direct``, the same pull with the plain
product of a layer's rows, ``2 R (d_in² + d_out²)`` for ``R`` of them. Inverse: ``d³`` for a factor of width ``d``,
``d³/3`` of them for Cholesky's factor and ``2d³/3`` for the inverse from it. Precondition: two products, ``2 d_in d_out
(d_in + d_out)``.

Bytes are the least that must be read and written. Statistics: each layer's input is read, its cotangent written and
read, its factors read and written. Inverse: factors are read, inverses written. Precondition: inverses and gradients
are read, directions written.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from kronfac.approximations import Statistic
from kronfac.approximations.diagonal import DiagonalStatistic
from kronfac.approximations.kfac import KFACStatistic
from kronfac.experiments.bench.ceilings import Ceilings
from kronfac.experiments.bench.parts import BOUNDED, gradients_only, started, with_statistics
from kronfac.experiments.bench.timing import Spread
from kronfac.experiments.bench.workloads import Workload
from kronfac.optim import KFAC
from kronfac.tape import Call, record

_ATEN = torch.ops.aten
#: PyTorch counts products that make a new tensor; sums of products in place are ours.
_FORMULAS = flop_registry | {
    _ATEN.addmm_: flop_registry[_ATEN.addmm],
    _ATEN.baddbmm_: flop_registry[_ATEN.baddbmm],
}


class Products(TorchDispatchMode):
    """Counts FLOPs of matrix products, convolutions and attention within the block.

    Attributes:
        flops: By dtype of the first operand.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            first = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            shaped = [argument for argument in args if not isinstance(argument, torch.dtype)]
            self.flops[first.dtype] += formula(*shaped, **(kwargs or {}), out_val=out)
        return out


@dataclass(frozen=True)
class Floor:
    """One part beside what it cannot go below.

    Attributes:
        flops: FLOPs of the library's form.
        direct: FLOPs of the plain form.
        bytes: Bytes that must be moved.
        flop_floor: Milliseconds for the FLOPs at the measured ceilings.
        byte_floor: Milliseconds for the bytes.
        measured: Milliseconds that it took.
    """

    flops: float
    direct: float
    bytes: float
    flop_floor: float
    byte_floor: float
    measured: float

    @property
    def ratio(self) -> float:
        """How many times the greater floor it took."""
        return self.measured / max(self.flop_floor, self.byte_floor)

    def as_dict(self) -> dict[str, float]:
        """Return the numbers by name."""
        return {**asdict(self), "ratio": self.ratio}


@dataclass(frozen=True)
class Cost:
    """What a part must do.

    Attributes:
        flops: By dtype.
        direct: FLOPs of the plain form.
        bytes: Bytes that must be moved.
    """

    flops: Counter[torch.dtype]
    direct: float
    bytes: float


def costs(work: Workload) -> dict[str, Cost]:
    """Count what the parts must do.

    Args:
        work: The workload.

    Returns:
        By part.
    """
    optimizer = started(work)
    with Products() as plain:
        gradients_only(work, optimizer)
    with Products() as gathering:
        with_statistics(work, optimizer)
    gathering.flops.subtract(plain.flops)
    with record(optimizer._estimator.adaptation.adapters) as tape:
        with torch.autocast(work.device.type, torch.bfloat16, enabled=work.precision == "bfloat16"):
            outputs = work.model(work.inputs)
        with Products() as pull:
            tape.stream(outputs, torch.ones_like(outputs), lambda name, cotangent: None, retain_graph=False)
    statistics = optimizer._estimator.statistics
    held = factor_bytes(optimizer)
    moved = sum(_moved(call) for call in tape.calls.values())
    direct = sum(pull.flops.values()) + sum(_direct(statistics[n], call) for n, call in tape.calls.items())
    widths = [(s.layer.d_in, s.layer.d_out, s.layer) for s in statistics.values() if isinstance(s, KFACStatistic)]
    cubes = sum(m.numel() * m.shape[-1] for s in statistics.values() for m in _matrices(s))
    # A diagonal input factor scales columns; grouped layers have a pair of products for each group.
    products = sum(
        2 * math.prod(layer.stack) * i * o * (o if layer.diagonal_input else i + o) for i, o, layer in widths
    )
    parameters = 4.0 * sum(s.layer.shape.numel() for s in statistics.values())
    return {
        "statistics": Cost(gathering.flops, direct, moved + 2 * held),
        "inverse": Cost(Counter({torch.float32: cubes}), cubes, 2 * held),
        "precondition": Cost(Counter({torch.float32: products}), products, held + 2 * parameters),
    }


def factor_bytes(optimizer: KFAC) -> float:
    """Bytes of all factors.

    Args:
        optimizer: The optimiser.

    Returns:
        Their number.
    """
    means = [mean for s in optimizer._estimator.statistics.values() for mean in s.means().values()]
    return float(sum(mean.total.numel() * mean.total.element_size() for mean in means))


def _matrices(statistic: Statistic) -> list[Tensor]:
    """What is inverted as a matrix."""
    if isinstance(statistic, DiagonalStatistic):
        return []
    totals = [mean.total for mean in statistic.means().values()]
    return [total for total in totals if total.ndim > 1 and total.shape[-1] == total.shape[-2]]


def _moved(call: Call) -> float:
    """Bytes of a layer's input, and twice of its cotangent."""
    return float((call.input.numel() + 2 * math.prod(call.output_shape)) * call.input.element_size())


def _direct(statistic: Statistic, call: Call) -> float:
    """FLOPs of the plain products of a layer's rows."""
    layer = statistic.layer
    rows = math.prod(layer.positions(call.input)) * math.prod(layer.stack)
    if isinstance(statistic, DiagonalStatistic):
        return 2.0 * rows * layer.d_in * layer.d_out
    if not isinstance(statistic, KFACStatistic):
        return 0.0
    return 2.0 * rows * ((0 if layer.diagonal_input else layer.d_in**2) + layer.d_out**2)


def floors(costs_: dict[str, Cost], limits: Ceilings, rows: dict[str, Spread]) -> dict[str, Floor]:
    """Set what was measured beside what must be done.

    Args:
        costs_: By part.
        limits: What the machine does.
        rows: From `parts.measure`, all of its bounded parts.

    Returns:
        By part.
    """
    base = rows["forward+backward, ms"].median
    found = {}
    for part in BOUNDED:
        cost = costs_[part]
        seconds = sum(count / limits.flops[dtype] for dtype, count in cost.flops.items() if count)
        found[part] = Floor(
            flops=float(sum(cost.flops.values())),
            direct=float(cost.direct),
            bytes=cost.bytes,
            flop_floor=1e3 * seconds,
            byte_floor=1e3 * cost.bytes / limits.bytes,
            measured=rows[part].median * base,
        )
    return found
