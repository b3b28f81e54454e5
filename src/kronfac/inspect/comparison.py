"""A block against the exact matrix ``F = Σ_k u_k u_kᵀ`` given by its roots, without forming ``F`` where it is large."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kronfac.blocks import Block, Diagonal

#: Up to this many entries ``C - F`` is formed, and its norm has all digits; beyond, it is a difference of squares.
DIRECT = 1 << 22


@dataclass(frozen=True)
class Comparison:
    """How a block ``C`` compares with the exact matrix ``F``, restricted to the entries that the block keeps.

    Attributes:
        cosine: ``⟨C, F⟩ / (|C| |F|)`` with Frobenius products; 1 if both are zero, 0 if one is.
        scale: ``tr C / tr F``.
        error: ``|C - F| / |F|``.
        left_out: Share of ``|F|²``, over the whole layer, that lies between groups or units or off the diagonal,
            where the block keeps nothing.
        trace: ``tr F``.
        norm: ``|F|``.
        block_norm: ``|C|``.
    """

    cosine: float
    scale: float
    error: float
    left_out: float
    trace: float
    norm: float
    block_norm: float


class Roots:
    """Roots of an exact matrix, with what comparisons of several blocks with it share.

    Args:
        tensor: ``u``, shape ``[K, *stack, d_out, d_in]``, in float64.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.trace = float(tensor.square().sum())
        self._squares: dict[int, float] = {}
        self._moments: dict[int, Tensor] = {}

    def units(self, count: int) -> Tensor:
        """Roots as ``[K, count, n]``."""
        return self.tensor.reshape(len(self.tensor), count, -1)

    def squared(self, count: int) -> float:
        """``Σ |F|²`` over the diagonal blocks of that many units."""
        if count not in self._squares:
            self._squares[count] = _squared_norm(self.units(count))
        return self._squares[count]

    def moments(self, count: int) -> Tensor:
        """Those diagonal blocks, ``[count, n, n]``."""
        if count not in self._moments:
            units = self.units(count).movedim(0, 1)
            self._moments[count] = units.mT @ units
        return self._moments[count]


def compare(block: Block, roots: Tensor | Roots) -> Comparison:
    """Compare a block with the exact matrix.

    ``⟨C, F⟩ = Σ_k u_kᵀ C u_k``, and ``|F|²`` is the squared norm of the Gram matrix of the roots; for a block over a
    stack (groups, units) both are summed over the stack. Exact for layers of any size.

    Args:
        block: ``C``, in float64.
        roots: ``u``, shape ``[K, *stack, d_out, d_in]``, in float64; as `Roots` where several blocks are compared.

    Returns:
        The comparison.
    """
    roots = roots if isinstance(roots, Roots) else Roots(roots)
    trace, entries = roots.trace, block.shape.numel()
    units = entries if isinstance(block, Diagonal) else math.prod(block.shape[:-2])
    squared, whole = roots.squared(units), roots.squared(1)
    product, block_norm = float(block.quadratic_form(roots.tensor).sum()), float(block.frobenius_norm())
    norm = math.sqrt(squared)
    if entries**2 // units <= DIRECT:
        difference = _difference(block, roots.moments(units))
    else:
        difference = math.sqrt(max(0.0, block_norm**2 - 2 * product + squared))
    both = norm * block_norm
    return Comparison(
        cosine=product / both if both else float(norm == block_norm),
        scale=ratio(float(block.trace()), trace),
        error=difference / norm if norm else (0.0 if not block_norm else math.inf),
        left_out=max(0.0, 1 - squared / whole) if whole else 0.0,
        trace=trace,
        norm=norm,
        block_norm=block_norm,
    )


def ratio(found: float, wanted: float) -> float:
    """Divide, with 0/0 = 1.

    Args:
        found: Numerator.
        wanted: Denominator, not negative.

    Returns:
        The ratio; infinite if only the denominator is zero.
    """
    return found / wanted if wanted else (1.0 if not found else math.inf)


def _squared_norm(kept: Tensor) -> float:
    """``Σ_stack |F|²`` by the smaller of ``F`` and the Gram matrix."""
    count, _, width = kept.shape
    units = kept.movedim(0, 1)
    gram = units.mT @ units if width <= count else units @ units.mT
    return float(gram.square().sum())


def _difference(block: Block, exact: Tensor) -> float:
    if isinstance(block, Diagonal):
        return float(torch.linalg.vector_norm(block.diagonal().flatten() - exact.flatten()))
    return float(torch.linalg.vector_norm(block.matrices().reshape(exact.shape) - exact))
