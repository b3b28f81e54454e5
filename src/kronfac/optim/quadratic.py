"""The quadratic model of a loss in a few directions, with exact curvature (Grosse & Martens 2016, equation 36)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kronfac.optim.options import inner_product


@dataclass(frozen=True, eq=False)
class QuadraticModel:
    """``M(Σ cᵢ vᵢ) − M(0) = Σ cᵢ ∇hᵀvᵢ + ½ Σ cᵢ cⱼ vᵢᵀ(F + κI)vⱼ`` for directions ``v₁ … v_R``.

    Attributes:
        slopes: ``∇hᵀvᵢ``, shape ``[R]``, float64.
        curvature: ``vᵢᵀ F vⱼ``, shape ``[R, R]``, float64.
        squares: ``vᵢᵀ vⱼ``, shape ``[R, R]``, float64; kept apart so that another ``κ`` costs nothing.
        noise: Relative rounding error of the entries, that of the dtype they were computed in.
    """

    slopes: Tensor
    curvature: Tensor
    squares: Tensor
    noise: float

    def minimise(self, damping: float) -> Tensor:
        """Coefficients of the minimum: ``C c = −d`` with ``C = vᵀ(F + κI)v``.

        Directions that are the same to rounding are not told apart: the solution of least norm is taken then.

        Args:
            damping: ``κ = λ + r``, not negative.

        Returns:
            Shape ``[R]``, float64.
        """
        matrix = self.curvature + damping * self.squares
        scale = matrix.diagonal().clamp_min(0).sqrt()
        scale = torch.where(scale > 0, scale.reciprocal(), torch.zeros_like(scale))
        values, vectors = torch.linalg.eigh(scale[:, None] * matrix * scale)
        usable = values > 10 * self.noise * values.max().clamp_min(0)
        reciprocals = torch.where(usable, values.reciprocal(), torch.zeros_like(values))
        return -scale * (vectors @ (reciprocals * (vectors.T @ (scale * self.slopes))))

    def change(self, coefficients: Tensor, damping: float) -> float:
        """Predicted change of the objective, ``M(δ) − M(0)``.

        Args:
            coefficients: ``c``.
            damping: ``κ``.

        Returns:
            The change; ``½ ∇hᵀδ`` at the minimum.
        """
        matrix = self.curvature + damping * self.squares
        return float(self.slopes @ coefficients + 0.5 * coefficients @ matrix @ coefficients)


def inner_products(left: Sequence[Sequence[Tensor]], right: Sequence[Sequence[Tensor]]) -> Tensor:
    """Inner products of vectors that are lists of tensors.

    Args:
        left: ``R`` vectors.
        right: ``S`` vectors.

    Returns:
        Shape ``[R, S]``, float64.
    """
    rows = [
        torch.stack(
            [torch.stack([inner_product(a, b).double() for a, b in zip(u, v, strict=True)]).sum() for v in right]
        )
        for u in left
    ]
    return torch.stack(rows)
