"""Eigendecomposition of a block, and the inverse that it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Eigenbasis:
    """Eigenvalues of a block with the maps into and out of its eigenbasis.

    Attributes:
        values: Eigenvalues in the block's shape ``[*stack, d_out, d_in]``: that of the coordinate at the same place in
            the eigenbasis. Not sorted; never negative.
        to_basis: ``V -> Q^T vec(V)``, in the shape of ``V``.
        from_basis: ``V -> Q vec(V)``, in the shape of ``V``.
    """

    values: Tensor
    to_basis: Callable[[Tensor], Tensor]
    from_basis: Callable[[Tensor], Tensor]

    def spectrum(self) -> Tensor:
        """All eigenvalues.

        Returns:
            Shape ``[P]``, ascending.
        """
        return self.values.flatten().sort().values
