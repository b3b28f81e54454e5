"""Refresh of the inverses that gradients are multiplied by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kronfac.approximations import Statistic
from kronfac.blocks import (
    Block,
    Dense,
    DenseInverse,
    Inverse,
    Kronecker,
    KroneckerInverse,
    KroneckerSums,
    PerFactor,
    Shift,
    Uniform,
    read_together,
)
from kronfac.damping import Rule
from kronfac.linalg.factorise import retries
from kronfac.linalg.inverse import invert
from kronfac.linalg.newton_schulz import renew
from kronfac.linalg.symmetric import all_finite
from kronfac.optim.warm import as_product


@dataclass
class Refreshed:
    """New inverses, and what they took.

    Attributes:
        inverses: By layer.
        retried: Layers of which a factor took float64, in order and with repetition.
        iterations: Iterations of Newton-Schulz by layer, those of both factors.
        fallbacks: Layers of which a factor was too far from the one before and took Cholesky, as ``retried``.
    """

    inverses: dict[str, Inverse] = field(default_factory=dict)
    retried: tuple[str, ...] = ()
    iterations: dict[str, int] = field(default_factory=dict)
    fallbacks: tuple[str, ...] = ()

    def merge(self, other: Refreshed) -> None:
        """Take another group's in.

        Args:
            other: Of other layers.
        """
        self.inverses |= other.inverses
        self.retried += other.retried
        self.iterations |= other.iterations
        self.fallbacks += other.fallbacks


def refresh(
    inverses: dict[str, Inverse],
    statistics: Mapping[str, Statistic],
    damping: Callable[[str], float],
    rule: Rule | Mapping[str, Rule],
    *,
    warm: bool = False,
) -> Refreshed:
    """Renew eigenbases that are kept, and factorise the damped blocks of all layers, equal shapes together.

    A group's old inverses are dropped before its new ones are made, so that two sets are never held, unless they are
    what the new ones start from.  A block that cannot be inverted even in float64 raises a
    ``torch.linalg.LinAlgError`` that names the layer.

    Args:
        inverses: Inverses by layer, replaced one group after the other.
        statistics: The layers' running statistics.
        damping: Damping of a layer.
        rule: How it is added: a rule for all layers, or one for each by name.
        warm: Whether Kronecker factors are inverted by Newton-Schulz from the old inverses.

    Returns:
        The new inverses, which are in ``inverses`` too.
    """
    out = Refreshed()
    for names in _groups(statistics, draft=True):
        starts: dict[str, Inverse] | None = (
            {name: inverses[name] for name in names if name in inverses} if warm else None
        )
        for name in names:
            inverses.pop(name, None)
            statistics[name].rebase()
        found = _factorise(damped_blocks(names, statistics, damping, rule, draft=True), starts)
        inverses |= found.inverses
        out.merge(found)
    return out


def snapshot(
    statistics: Mapping[str, Statistic],
    damping: Callable[[str], float],
    rule: Rule | Mapping[str, Rule],
    starts: Mapping[str, Inverse] | None = None,
) -> Callable[[], Refreshed]:
    """Copy what a refresh needs, so that it can be done later or elsewhere while the statistics go on.

    Args:
        statistics: The layers' running statistics, none of which keeps a basis.
        damping: Damping of a layer.
        rule: How it is added: a rule for all layers, or one for each by name.
        starts: Inverses that Newton-Schulz starts from, by layer; None for Cholesky.

    Returns:
        A function that factorises the copies, to be called once.
    """
    groups = [damped_blocks(names, statistics, damping, rule) for names in _groups(statistics, draft=False)]
    for inverse in (starts or {}).values():
        for tensor in inverse.tensors().values():
            if tensor.is_cuda:  # read on this stream, though made on another
                tensor.record_stream(torch.cuda.current_stream(tensor.device))

    def factorise() -> Refreshed:
        out = Refreshed()
        while groups:
            out.merge(_factorise(groups.pop(0), starts))
        return out

    return factorise


def renew_values(
    inverses: dict[str, Inverse],
    statistics: Mapping[str, Statistic],
    damping: Callable[[str], float],
    rule: Rule | Mapping[str, Rule],
) -> Refreshed:
    """Bring inverses whose eigenbasis is kept up to date between two refreshes: reciprocals alone.

    Args:
        inverses: Inverses by layer; those of other layers are left alone.
        statistics: The layers' running statistics.
        damping: Damping of a layer.
        rule: How it is added.

    Returns:
        The new inverses, which are in ``inverses`` too.
    """
    names = [name for name, statistic in statistics.items() if statistic.keeps_basis and name in inverses]
    if not names:
        return Refreshed()
    found = _factorise(damped_blocks(names, statistics, damping, rule))
    inverses |= found.inverses
    return found


#: Blocks and what is added to them, by layer.
_Damped = dict[str, tuple[Block, Shift]]


def _groups(statistics: Mapping[str, Statistic], draft: bool) -> list[list[str]]:
    """Layers whose blocks may be held at once: of equal kind and shapes, and all whose drafts take no memory."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, statistic in statistics.items():
        shapes = tuple((key, mean.total.shape) for key, mean in statistic.means().items())
        groups.setdefault(() if draft and statistic.drafts else (type(statistic), shapes), []).append(name)
    return list(groups.values())


def damped_blocks(
    names: list[str],
    statistics: Mapping[str, Statistic],
    damping: Callable[[str], float],
    rule: Rule | Mapping[str, Rule],
    draft: bool = False,
) -> _Damped:
    """Blocks of layers, and what is added to them.

    Args:
        names: The layers.
        statistics: Their running statistics.
        damping: Damping of a layer.
        rule: How it is added: a rule for all layers, or one for each by name.
        draft: Whether they are needed no longer than the statistics stay what they are.

    Returns:
        Block and shift by layer.
    """
    blocks = {name: statistics[name].draft() if draft else statistics[name].block() for name in names}
    read_together(blocks.values())
    sums = {name: block for name, block in blocks.items() if isinstance(block, KroneckerSums)}
    if not all_finite(*(mean for block in sums.values() for mean in block.factor_means())):
        for name in sums:
            statistics[name].block()  # says which is not: no entry of a sum of squares exceeds the trace
    rules = rule if isinstance(rule, Mapping) else dict.fromkeys(names, rule)
    return {name: (block, rules[name](block, damping(name))) for name, block in blocks.items()}


def _factorise(damped: _Damped, starts: Mapping[str, Inverse] | None = None) -> Refreshed:
    """Factorise a group; it is emptied on the way."""
    out = Refreshed()
    if starts is not None:
        damped |= {name: as_product(*pair) for name, pair in damped.items()}
    products: dict[str, tuple[Kronecker, PerFactor]] = {}
    units: dict[str, tuple[Dense, Uniform]] = {}
    for name in list(damped):
        match damped[name]:
            case (Kronecker() as product, PerFactor() as per_factor):
                products[name] = product, per_factor
            case (Dense() as dense, Uniform() as uniform):
                units[name] = dense, uniform
            case _:
                continue
        del damped[name]
    if starts is not None:
        out.merge(_renew(products, starts))
    out.merge(_invert(products, units))
    for name in list(damped):
        block, shift = damped.pop(name)
        try:
            with retries() as again:
                out.inverses[name] = block.factorise(shift)
        except torch.linalg.LinAlgError as error:
            raise torch.linalg.LinAlgError(f"layer {name!r}: {error}") from error
        out.retried += (name,) * len(again)
    return out


def _invert(products: dict[str, tuple[Kronecker, PerFactor]], units: dict[str, tuple[Dense, Uniform]]) -> Refreshed:
    """Invert all matrices of the blocks in one call; the dictionaries are emptied."""
    names, shapes = list(products), {name: block.shape for name, (block, _) in units.items()}
    layers: dict[str, str] = {}  # by what a matrix is called
    matrices: list[Tensor] = []
    shifts: list[Tensor | float] = []
    scales: list[float] = []

    def add(label: str, name: str, matrix: Tensor, scale: float, shift: Tensor | float) -> None:
        layers[f"{label} of layer {name!r}"] = name
        matrices.append(matrix)
        scales.append(scale)
        shifts.append(shift)

    for side in ("input", "output"):
        for name, (product, per_factor) in products.items():
            add(f"the {side} factor", name, *product.sums()[side], getattr(per_factor, side))
    for name, (dense, uniform) in units.items():
        add("the block", name, dense.matrix, 1.0, uniform.value)
    products.clear()
    units.clear()
    with retries() as again:
        found = invert(matrices, shifts, list(layers), scales)
    out = Refreshed(retried=tuple(layers[label] for label in again))
    count = len(names)
    for name, a, g in zip(names, found[:count], found[count : 2 * count], strict=True):
        out.inverses[name] = KroneckerInverse(a.inverse, g.inverse)
    for (name, shape), unit in zip(shapes.items(), found[2 * count :], strict=True):
        out.inverses[name] = DenseInverse(unit.inverse, shape, unit.logdet.sum())
    return out


def _renew(products: dict[str, tuple[Kronecker, PerFactor]], starts: Mapping[str, Inverse]) -> Refreshed:
    """Invert the factors by Newton-Schulz from the inverses that were; the dictionary is emptied."""
    out, names = Refreshed(), list(products)
    pairs = [products.pop(name) for name in names]
    sides: dict[str, list[Tensor]] = {}
    for side in ("input", "output"):
        labels = {f"the {side} factor of layer {name!r}": name for name in names}
        factors = [getattr(block, side) for block, _ in pairs]
        added = [getattr(shift, side) for _, shift in pairs]
        olds = [getattr(starts.get(name), side, None) for name in names]
        with retries() as again:
            found = renew(factors, added, olds, list(labels))
        sides[side] = [result.inverse for result in found]
        for name, result in zip(names, found, strict=True):
            out.iterations[name] = out.iterations.get(name, 0) + result.iterations
            out.fallbacks += (name,) * result.fallback
        out.retried += tuple(labels[label] for label in again)
    out.inverses = {n: KroneckerInverse(a, g) for n, a, g in zip(names, sides["input"], sides["output"], strict=True)}
    return out
