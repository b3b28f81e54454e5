"""Sums of two damped curvatures that have no closed inverse, solved by conjugate gradients within each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn, Self

import torch
from torch import Tensor

from kronfac.blocks import Inverse, PerFactor, Uniform
from kronfac.linalg.conjugate_gradient import conjugate_gradient
from kronfac.optim.wake import Damped

#: Relative residual at which a solve ends, and above which it is refused, in units of the dtype's root of precision.
_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-6}
_REFUSED = {torch.float64: 1e-8, torch.float32: 1e-3}
_ITERATIONS = 500


class IterativeSum(Inverse):
    """``(F̄ + w B)⁻¹`` by conjugate gradients, preconditioned by ``F̄⁻¹``.

    The preconditioned matrix is ``I + w F̄⁻¹B``: for a large ``λ = 1/w`` it is near the identity, and a few products do.
    Any two blocks with products will do, of whatever structure. It lives for one step and is never saved: what is
    saved in its place is ``base``.

    Args:
        first: ``F̄``.
        second: ``B``.
        weight: ``w``.
        name: The layer, for errors.

    Attributes:
        base: ``F̄⁻¹``, factorised.
        iterations: Those of the last solve.
    """

    kind = "iterative_sum"

    def __init__(self, first: Damped, second: Damped, weight: float, name: str) -> None:
        self._first, self._second, self._weight, self._name = first, second, weight, name
        self.shape = first.block.shape
        whole = bool(first.added) or PerFactor not in first.block.shifts
        self.base = first.block.factorise(Uniform(first.added) if whole else PerFactor(0.0, 0.0))
        self.iterations = 0

    def apply(self, vector: Tensor) -> Tensor:
        """Solve.

        Args:
            vector: ``V``, shape ``[*stack, d_out, d_in]``.

        Returns:
            The solution, of the same shape.

        Raises:
            torch.linalg.LinAlgError: Conjugate gradients do not get there.
        """
        found = conjugate_gradient(
            lambda x: self._first.matmul(x).add(self._second.matmul(x), alpha=self._weight),
            vector,
            tolerance=_TOLERANCE[vector.dtype],
            max_iterations=_ITERATIONS,
            preconditioner=self.base.apply,
        )
        self.iterations = found.iterations
        if found.residual > _REFUSED[vector.dtype]:
            raise torch.linalg.LinAlgError(
                f"layer {self._name!r}: solve='iterative' ended with a relative residual of {found.residual:.2g} after "
                f"{found.iterations} iterations ({found.reason}); raise damping or lam"
            )
        return found.solution

    def tensors(self) -> dict[str, Tensor]:
        """Those of ``base``, which say dtype and device.

        Returns:
            Tensors by name.
        """
        return self.base.tensors()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: torch.Size) -> Self:
        """It is made anew at each step, and never read back."""
        raise NotImplementedError("An iterative solve is not saved.")

    def sqrt_apply(self, vector: Tensor) -> Tensor:
        """There is no root to multiply by."""
        self._refuse("root")

    def logdet(self) -> Tensor:
        """There is no log-determinant without a factorisation."""
        self._refuse("log-determinant")

    def _refuse(self, what: str) -> NoReturn:
        raise NotImplementedError(f"An iterative solve of a sum has no {what}.")
