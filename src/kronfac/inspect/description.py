"""What a layer's statistics stand for: kind of block, sizes, memory, and what is assumed. No data is needed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from kronfac.approximations import Approximation, Statistic
from kronfac.approximations.dense import DenseStatistic
from kronfac.approximations.diagonal import DiagonalStatistic
from kronfac.approximations.ekfac import EKFACStatistic
from kronfac.approximations.kfac import KFACStatistic
from kronfac.approximations.nearest import NearestKroneckerStatistic
from kronfac.approximations.prong import PRONGStatistic
from kronfac.approximations.sua import SUAStatistic
from kronfac.approximations.tkfac import TKFACStatistic
from kronfac.approximations.xkfac import XKFACStatistic
from kronfac.layers import LayerAdapter


@dataclass(frozen=True)
class Description:
    """One layer's block.

    Attributes:
        kind: Kind of block.
        factors: Sizes of its factors.
        widths: Width of each matrix, or length of each vector, that is kept.
        entries: Numbers kept as statistics.
        inverse: Numbers kept once inverted, with factored damping.
        exact_inverse: Numbers kept once inverted, with exact damping.
        holds: What the block is, where nothing is assumed.
        assumes: What is assumed of the model or the data; empty for an exact block.
    """

    kind: str
    factors: str
    widths: tuple[int, ...]
    entries: int
    inverse: int
    exact_inverse: int
    holds: str
    assumes: tuple[str, ...] = ()


class _Weightless(TorchFunctionMode):
    """Factory functions give tensors without memory, whatever device they are asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.zeros, torch.ones, torch.empty, torch.full, torch.eye):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def start(approximation: Approximation, layer: LayerAdapter) -> Statistic:
    """Return a layer's empty statistics on the meta device: shapes, and no memory.

    Args:
        approximation: The approximation.
        layer: The layer's adapter.

    Returns:
        The statistics.
    """
    with _Weightless():
        return approximation.start(layer)


@singledispatch
def describe(statistic: Statistic) -> Description:
    """Describe what statistics stand for; register those of a new approximation with ``@describe.register``.

    Args:
        statistic: Empty statistics.

    Returns:
        The description; for unknown statistics, the sizes of what they keep, counted once more for the inverse.
    """
    totals = {name: mean.total for name, mean in statistic.means().items()}
    entries = sum(total.numel() for total in totals.values())
    text = ", ".join(f"{name} {_times(*total.shape)}" for name, total in totals.items())
    kind = type(statistic).__name__.removesuffix("Statistic").lower()
    widths = tuple(total.shape[-1] for total in totals.values())
    return Description(kind, text, widths, entries, entries, entries, "", (f"see {type(statistic).__name__}",))


@describe.register
def _(statistic: KFACStatistic) -> Description:
    return _kronecker(statistic.layer, _factored_assumptions(statistic.layer))


@describe.register
def _(statistic: SUAStatistic) -> Description:
    return _kronecker(statistic.layer, (*_factored_assumptions(statistic.layer), _UNCORRELATED))


@describe.register
def _(statistic: PRONGStatistic) -> Description:
    layer = statistic.layer
    assumed = [*_factored_assumptions(layer), "cotangents as white"]
    if statistic.channels is not None:
        assumed.append(_UNCORRELATED if statistic.boundaries else f"{_UNCORRELATED}, at borders too")
    return _kronecker(layer, tuple(assumed))


#: SUA (Grosse & Martens 2016, section 4.2).
_UNCORRELATED = "activations as uncorrelated over positions but for their mean"


def _kronecker(layer: LayerAdapter, assumes: tuple[str, ...]) -> Description:
    """Describe a Kronecker product of the layer's two widths."""
    d_in, d_out, stack = layer.d_in, layer.d_out, math.prod(layer.stack)
    input = d_in if layer.diagonal_input else d_in * d_in
    basis = d_out * d_out + (0 if layer.diagonal_input else input)
    left = f"diag {d_in}" if layer.diagonal_input else _times(d_in, d_in)
    return Description(
        kind="kronecker, diagonal input" if layer.diagonal_input else "kronecker",
        factors=_repeated(layer, f"{left} (x) {_times(d_out, d_out)}"),
        widths=(d_in, d_out),
        entries=stack * (input + d_out * d_out),
        inverse=stack * (input + d_out * d_out),
        exact_inverse=stack * (basis + 2 * d_in * d_out),
        holds="bias alone, its input is constant",
        assumes=assumes,
    )


@describe.register
def _(statistic: TKFACStatistic) -> Description:
    layer = statistic.layer
    d_in, d_out, stack = layer.d_in, layer.d_out, math.prod(layer.stack)
    input = d_in if layer.diagonal_input else d_in * d_in
    basis = d_out * d_out + (0 if layer.diagonal_input else input)
    left = f"diag {d_in}" if layer.diagonal_input else _times(d_in, d_in)
    assumed = list(_factored_assumptions(layer))
    if layer.has_weight:
        # With a factor of one row nothing but the trace is left to be shared out.
        assumed[:1] = ["one product that keeps both partial traces"] if min(d_in, d_out) > 1 else []
    return Description(
        kind="scaled kronecker, diagonal input" if layer.diagonal_input else "scaled kronecker",
        factors=_repeated(layer, f"{left} (x) {_times(d_out, d_out)}"),
        widths=(d_in, d_out),
        entries=stack * (input + d_out * d_out),
        inverse=stack * (input + d_out * d_out),
        exact_inverse=stack * (basis + 2 * d_in * d_out),
        holds="one factor has a single row: nothing is approximated",
        assumes=tuple(assumed),
    )


@describe.register
def _(statistic: XKFACStatistic) -> Description:
    layer = statistic.layer
    d_in, d_out, stack = layer.d_in, layer.d_out, math.prod(layer.stack)
    squares = d_in * d_in + d_out * d_out
    assumed = [*_factored_assumptions(layer), "one product where no batch norm lies behind, or it alone, directly"]
    return Description(
        kind="kronecker sum",
        factors=_repeated(layer, f"2 x {_times(d_in, d_in)} (x) {_times(d_out, d_out)}"),
        widths=(d_in, d_out),
        entries=stack * 2 * squares,
        inverse=stack * (squares + d_in * d_out),
        exact_inverse=stack * (d_in * d_out) ** 2,
        holds="",
        assumes=tuple(assumed),
    )


@describe.register
def _(statistic: DenseStatistic) -> Description:
    layer = statistic.layer
    width, stack = layer.d_out * layer.d_in, math.prod(layer.stack)
    entries = stack * width * width
    if layer.unit_wise:
        holds = "unit-wise block, nothing between units" if layer.stack else "one block over all units"
        if isinstance(layer.module, nn.modules.batchnorm._NormBase):
            holds += " (train mode)" if layer.module.training else " (eval mode)"
    else:
        holds = "block of every group, nothing between groups" if layer.stack else "block of the whole layer"
    return Description(
        kind="dense per unit" if layer.unit_wise and layer.stack else "dense per group" if layer.stack else "dense",
        factors=_repeated(layer, _times(width, width)),
        widths=(width,),
        entries=entries,
        inverse=entries,
        exact_inverse=entries,
        holds=holds,
    )


@describe.register
def _(statistic: DiagonalStatistic) -> Description:
    layer = statistic.layer
    entries = layer.shape.numel()
    inverse = 2 * entries
    holds = "the diagonal; nothing off it"
    return Description("diagonal", f"diag {entries}", (entries,), entries, inverse, inverse, holds)


@describe.register
def _(statistic: EKFACStatistic) -> Description:
    layer, base = statistic.layer, describe(statistic.base)
    values = layer.shape.numel()
    bases = sum(shape.numel() for shape in statistic.constant_shapes().values())
    assumes = ["gradients uncorrelated in the eigenbasis of the factors, at the scale they really have there"]
    if not layer.has_weight and layer.sharing == "reduce":
        assumes = []  # the output factor is the block, and its eigenvectors the basis
    if layer.stack:
        assumes.append("nothing between groups")
    return Description(
        kind=f"eigen-{base.kind}",
        factors=f"{base.factors}, {_times(*layer.shape)} values",
        widths=base.widths,
        entries=base.entries + bases + values,
        inverse=2 * values,  # values and their reciprocals; the bases are those of the statistics
        exact_inverse=2 * values,
        holds=base.holds,
        assumes=tuple(assumes),
    )


@describe.register
def _(statistic: NearestKroneckerStatistic) -> Description:
    layer = statistic.layer
    d_in, d_out, stack = layer.d_in, layer.d_out, math.prod(layer.stack)
    inverse = stack * (d_in * d_in + d_out * d_out)
    return Description(
        kind="kronecker",
        factors=_repeated(layer, f"{_times(d_in, d_in)} (x) {_times(d_out, d_out)}"),
        widths=(d_in, d_out),
        entries=stack * (d_in * d_out) ** 2,  # the exact block, which it is fitted to
        inverse=inverse,
        exact_inverse=inverse + stack * 2 * d_in * d_out,
        holds="a block with one row or column is a Kronecker product",
        assumes=() if 1 in (d_in, d_out) else ("the nearest Kronecker product in place of the exact block",),
    )


def _factored_assumptions(layer: LayerAdapter) -> tuple[str, ...]:
    """What K-FAC assumes of a layer (Martens & Grosse 2015, section 3; Grosse & Martens 2016, section 3.1)."""
    assumed = []
    if layer.has_weight:
        assumed.append("inputs taken as independent of cotangents")
    if layer.sharing == "reduce":
        if layer.has_weight:
            assumed.append("positions averaged")
    elif isinstance(layer.module, nn.modules.conv._ConvNd):
        assumed.append("positions as uncorrelated")
    else:
        which = "calls and positions" if layer.repeats else "positions, where there are several,"
        assumed.append(f"{which} as uncorrelated")
    if layer.stack:
        assumed.append("nothing between groups")
    return tuple(assumed)


def _repeated(layer: LayerAdapter, text: str) -> str:
    return f"{math.prod(layer.stack)} of {text}" if layer.stack else text


def _times(*lengths: int) -> str:
    return "x".join(map(str, lengths))
