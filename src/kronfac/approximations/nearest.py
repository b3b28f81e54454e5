"""The Kronecker product nearest to the exact block in Frobenius norm: for reference, not a method to train with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kronfac.approximations.base import Approximation
from kronfac.approximations.dense import DenseStatistic
from kronfac.blocks import Block, Dense, Kronecker
from kronfac.layers import LayerAdapter

#: Double steps of the power iteration at most. Where it takes so many, the two largest singular values agree to about
#: one part in ten thousand and the distance is within rounding of the least one, whichever pair is returned.
STEPS = 5000


class Nearest(NamedTuple):
    """A Kronecker product ``output x input`` and what it is nearest by.

    Attributes:
        input: ``A``, shape ``[*stack, d_in, d_in]``, symmetric positive semi-definite.
        output: ``G``, shape ``[*stack, d_out, d_out]``, of the same Frobenius norm.
        norm: Frobenius norm of the product, the largest singular value of the rearranged matrix, shape ``[*stack]``.
    """

    input: Tensor
    output: Tensor
    norm: Tensor


@torch.no_grad()
def nearest_kronecker(matrix: Tensor, d_out: int, d_in: int) -> Nearest:
    """Find ``G x A`` nearest to a symmetric positive semi-definite matrix (Van Loan & Pitsianis 1993).

    The entries ``C[(o,i),(p,j)]``, rearranged as ``R[(o,p),(i,j)]``, turn ``|C - G x A|`` into the distance of ``R``
    from the matrix of rank one ``vec(G) vec(A)^T``: its dominant singular pair is the answer. Both maps
    ``A -> R vec(A)`` and ``G -> R^T vec(G)`` keep positive semi-definite matrices so, hence that pair can be taken
    positive semi-definite, and the power iteration from the identity finds it, sign included.

    Args:
        matrix: ``C``, shape ``[*stack, n, n]`` with ``n = d_out * d_in``, over the row-major ``vec(V)``.
        d_out: Rows of ``V``.
        d_in: Columns of ``V``.

    Returns:
        Both factors, in float64.
    """
    stack = matrix.shape[:-2]
    parts = matrix.double().reshape(*stack, d_out, d_in, d_out, d_in)
    rearranged = parts.transpose(-3, -2).reshape(*stack, d_out * d_out, d_in * d_in)
    right = torch.eye(d_in, dtype=torch.float64, device=matrix.device).flatten().expand(*stack, -1)
    right = right / right.norm(dim=-1, keepdim=True)
    left, norm = _unit((rearranged @ right.unsqueeze(-1)).squeeze(-1))
    for _ in range(STEPS):
        before = right
        right, norm = _unit((rearranged.mT @ left.unsqueeze(-1)).squeeze(-1))
        left, norm = _unit((rearranged @ right.unsqueeze(-1)).squeeze(-1))
        if float((right - before).norm(dim=-1).max()) < 1e-14:
            break
    root = norm.sqrt().unsqueeze(-1)
    input = (root * right).reshape(*stack, d_in, d_in)
    output = (root * left).reshape(*stack, d_out, d_out)
    return Nearest((input + input.mT) / 2, (output + output.mT) / 2, norm)


class NearestKroneckerStatistic(DenseStatistic):
    """The exact block, fitted when it is asked for.

    Args:
        layer: The layer's adapter.
    """

    def block(self) -> Block:
        """Return the Kronecker block nearest to the exact one, per stack element."""
        exact = super().block()
        assert isinstance(exact, Dense)
        found = nearest_kronecker(exact.matrix, self.layer.d_out, self.layer.d_in)
        return Kronecker(found.input.to(exact.dtype), found.output.to(exact.dtype))


class NearestKronecker(Approximation):
    """The Frobenius-optimal Kronecker product of every layer (Van Loan & Pitsianis 1993).

    It needs the exact block first, so that layers are limited as those of ``"dense"`` are: it shows what the best
    single Kronecker product could do, for comparison with those that need no exact block.
    """

    name = "nearest_kronecker"
    needs_pairs = True
    needs_examples = True
    keeps_trace = False  # the nearest product in Frobenius norm has a trace of its own

    def start(self, layer: LayerAdapter) -> NearestKroneckerStatistic:
        """Return an empty moment.

        Args:
            layer: The layer's adapter.

        Returns:
            The statistic.
        """
        return NearestKroneckerStatistic(layer)


def _unit(vector: Tensor) -> tuple[Tensor, Tensor]:
    """Direction and length; a zero vector has none and stays zero."""
    norm = vector.norm(dim=-1)
    return vector / norm.clamp_min(torch.finfo(vector.dtype).tiny).unsqueeze(-1), norm
