"""Parts of KLD-WRM: running means started at their first value, damped curvatures, and what their sums invert to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kronfac.approximations import Mean, Statistic
from kronfac.blocks import (
    Block,
    Dense,
    Diagonal,
    DiagonalKronecker,
    Inverse,
    Kronecker,
    KroneckerSum,
    PerFactor,
    ScaledKronecker,
    Shift,
    TwoTermInverse,
    Uniform,
)
from kronfac.layers import LayerAdapter

#: Total, weight and scale of each mean, by layer and key.
_Held = dict[tuple[str, str], tuple[Tensor, float, float]]


class WakeAverage:
    """``F̄_k = ρ F̄_{k−1} + (1 − ρ) F_k`` with ``F̄_0 = F_0`` (Puiu 2022, equations 13 and 18), mean by mean.

    `kronfac.optim.KFAC` corrects its averages for bias instead: there the first batch weighs as much as each later one,
    here ``1/(1 − ρ)`` times as much, and each batch counts once whatever its size.  While a step's batch is gathered,
    the statistics hold that batch alone, and the averages wait here.  They are kept until the step is taken: one that
    fails is undone.

    Args:
        statistics: The layers' statistics.
        rho: ``ρ`` in ``[0, 1)``.
    """

    def __init__(self, statistics: Mapping[str, Statistic], rho: float) -> None:
        self._statistics, self._rho = statistics, rho
        self._held: _Held | None = None
        self._before: _Held | None = None  # what was merged into, until the step is taken

    def _means(self) -> Iterator[tuple[tuple[str, str], Mean]]:
        for layer, statistic in self._statistics.items():
            for key, mean in statistic.means().items():
                yield (layer, key), mean

    def begin(self) -> None:
        """Put the averages aside and start a batch; a batch that was begun and never used is dropped."""
        if self._held is None:
            self._held = {key: (mean.total, mean.weight, mean.scale) for key, mean in self._means()}
        for _, mean in self._means():
            mean.total, mean.weight, mean.scale = torch.zeros_like(mean.total), 0.0, 1.0

    def merge(self) -> None:
        """Take the batch into the averages; those of layers that saw none of it stay what they were."""
        self._before, self._held = self._held, None
        held = self._before
        for key, mean in self._means() if held is not None else ():
            assert held is not None
            total, weight, scale = held[key]
            if mean.weight == 0.0:
                mean.total, mean.weight, mean.scale = total, weight, scale
            elif weight > 0.0:  # else it is the first: κ(0) = 1
                mean.total.mul_((1.0 - self._rho) * mean.scale / mean.weight)
                mean.total.add_(total, alpha=self._rho * scale / weight)
                mean.weight = mean.scale = 1.0

    def commit(self) -> None:
        """The step is taken: the batch stays in the averages."""
        self._before = None

    def undo(self) -> bool:
        """Put the averages back to what they were before the batch of a step that failed.

        Returns:
            Whether it had been merged.
        """
        before, self._before = self._before, None
        if before is not None:
            self._put(before)
        return before is not None

    def drop(self) -> None:
        """Forget averages that were put aside, because others take their place."""
        self._held = self._before = None

    def _put(self, averages: _Held) -> None:
        for key, mean in self._means():
            mean.total, mean.weight, mean.scale = averages[key]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the statistics are the averages, also while a batch is being gathered."""
        if self._held is None:
            yield
            return
        batch = {key: (mean.total, mean.weight, mean.scale) for key, mean in self._means()}
        self._put(self._held)
        try:
            yield
        finally:
            self._put(batch)


@dataclass(frozen=True)
class Damped:
    """A block with its damping: what stands for ``F`` wherever the paper writes ``F``.

    Attributes:
        block: The block, damping of single factors included.
        added: Multiple of the identity that is added to it.
    """

    block: Block
    added: float = 0.0

    @classmethod
    def of(cls, block: Block, shift: Shift) -> Damped:
        """Add a shift to a block.

        Args:
            block: The block.
            shift: What a damping rule decided.

        Returns:
            The sum.

        Raises:
            TypeError: It is none that can be multiplied with.
        """
        if isinstance(shift, Uniform):
            return cls(block, shift.value)
        if isinstance(shift, PerFactor):
            product = block.balanced() if isinstance(block, ScaledKronecker) else block
            if isinstance(product, Kronecker):
                return cls(Kronecker(_plus(product.input, shift.input), _plus(product.output, shift.output)))
            if isinstance(product, KroneckerSum):  # its first term is damped
                first = _plus(product.input, shift.input), _plus(product.output, shift.output)
                return cls(KroneckerSum(*first, product.second_input, product.second_output))
            if isinstance(product, DiagonalKronecker):
                added = shift.input.unsqueeze(-1) if isinstance(shift.input, Tensor) else shift.input
                return cls(DiagonalKronecker(product.input + added, _plus(product.output, shift.output)))
        raise TypeError(
            f"KLDWRM needs products with the damped curvature, which a {type(block).__name__} block with the shift "
            f"{type(shift).__name__} does not give; use damping_rule='factored'"
        )

    def matmul(self, vector: Tensor) -> Tensor:
        """Multiply by a vector.

        Args:
            vector: ``V``, shape ``[*stack, d_out, d_in]``.

        Returns:
            The product, of the same shape.
        """
        product = self.block.matmul(vector)
        return product.add(vector, alpha=self.added) if self.added else product


def sum_inverse(first: Damped, second: Damped, weight: float, name: str) -> Inverse:
    """Invert ``F̄ + w B`` exactly: the generalised Stein equation (81) by simultaneous diagonalisation.

    Args:
        first: ``F̄``.
        second: ``B``.
        weight: ``w = 1/λ``, not negative.
        name: The layer, for errors.

    Returns:
        The inverse; where the sum of the two has no solve, a ``TypeError`` says so.
    """
    mine, theirs = first.block, second.block
    if isinstance(mine, Kronecker) and isinstance(theirs, Kronecker) and not (first.added or second.added):
        pair = (theirs.input, theirs.output * weight)
        return TwoTermInverse.of((mine.input, mine.output), pair, name=f"the model of layer {name!r}")
    return _linear_inverse(first, second, weight, name, "stein")


def reweighted_inverse(first: Damped, second: Damped, weight: float, name: str) -> Inverse:
    """Invert ``F̄ + w B`` by re-weighting the newest factors, (82) and (83) corrected.

    ``Â = (Ā + w A)/√(1 + w)`` and likewise ``Γ̂``: the printed weights count ``w`` twice.  Exact where the average of
    products is the product of averages, that is where one of the two factors does not change.

    Args:
        first: ``F̄``.
        second: ``B``.
        weight: ``w = 1/λ``, not negative.
        name: The layer, for errors.

    Returns:
        The inverse.
    """
    mine, theirs = first.block, second.block
    root = math.sqrt(1.0 + weight)
    nothing = PerFactor(0.0, 0.0)
    if not (first.added or second.added):
        for kind in (Kronecker, DiagonalKronecker):
            if isinstance(mine, kind) and isinstance(theirs, kind):
                sides = ((mine.input, theirs.input), (mine.output, theirs.output))
                a, g = (torch.add(old, new, alpha=weight).div_(root) for old, new in sides)
                return kind(a, g).factorise(nothing)
    return _linear_inverse(first, second, weight, name, "reweighted")


def _linear_inverse(first: Damped, second: Damped, weight: float, name: str, solve: str) -> Inverse:
    """Blocks of which sums are again blocks of the kind."""
    mine, theirs = first.block, second.block
    if isinstance(mine, Dense | Diagonal) and type(mine) is type(theirs):
        new = theirs.tensors()
        total = {key: torch.add(tensor, new[key], alpha=weight) for key, tensor in mine.tensors().items()}
        return type(mine).from_tensors(total, mine.shape).factorise(Uniform(first.added + weight * second.added))
    damping = " with a multiple of the identity added" if first.added or second.added else ""
    other = "" if solve == "reweighted" or damping else ", or solve='reweighted'"
    raise TypeError(
        f"layer {name!r}: KLDWRM with solve={solve!r} has no inverse of a sum of two {type(mine).__name__} blocks"
        f"{damping}; use variant='so', or solve='iterative'{other}"
        f"{', or damping_rule=' + repr('factored') if damping else ''}"
    )


def layer_product(adapter: LayerAdapter, matrix: Damped, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiply a layer's matrix by a vector.

    Args:
        adapter: The layer.
        matrix: Its matrix.
        vector: By parameter name; what is left out is zero.

    Returns:
        The product, for all parameters of the layer, in their dtypes.
    """
    given = {n: (vector[n] if n in vector else torch.zeros_like(p)) for n, p in adapter.parameters.items()}
    packed = adapter.pack({n: tensor.to(matrix.block.dtype) for n, tensor in given.items()})
    product = adapter.unpack(matrix.matmul(packed.contiguous()))
    return {n: product[n].to(given[n].dtype) for n in given}


def layer_scales(
    adapters: Iterable[LayerAdapter], directions: Mapping[str, Tensor], clip: float, bound: float | None
) -> dict[str, float]:
    """Factor of each direction: one for all, times the clip of each layer's root mean square (Puiu 2022, 7.1).

    Args:
        adapters: The layers; a parameter that is in none is clipped by itself.
        directions: By parameter name.
        clip: The factor for all.
        bound: Largest root mean square of a layer's scaled direction, or None.

    Returns:
        Factors by parameter name.
    """
    if bound is None:
        return dict.fromkeys(directions, clip)
    layers = [[name for name in adapter.parameter_names if name in directions] for adapter in adapters]
    covered = {name for names in layers for name in names}
    layers += [[name] for name in directions if name not in covered]
    layers = [names for names in layers if names]
    squares = [torch.stack([directions[n].abs().double().square().sum() for n in names]).sum() for names in layers]
    scales: dict[str, float] = {}
    for names, square in zip(layers, torch.stack(squares).tolist() if squares else [], strict=True):
        rms = clip * math.sqrt(square / sum(directions[name].numel() for name in names))
        scales |= dict.fromkeys(names, clip * bound / rms if rms > bound else clip)
    return scales


def _plus(matrix: Tensor, shift: Tensor | float) -> Tensor:
    out = matrix.clone()
    if isinstance(shift, Tensor) and shift.ndim:
        shift = shift.to(out).unsqueeze(-1)
    out.diagonal(dim1=-2, dim2=-1).add_(shift)
    return out
