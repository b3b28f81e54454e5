"""The two dampings of TKFAC (Gao et al. 2020, section 5)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kronfac.blocks import Block, PerFactor, Rescaled, ScaledKronecker, Shift, Uniform
from kronfac.damping.rules import check_damping, split_ratio


def normal(block: Block, damping: float) -> Shift:
    """Add ``sqrt(damping)`` to both factors, balanced to equal traces (Gao et al. 2020, equation 5.15).

    ``sqrt(delta) Phi + sqrt(damping) I`` and ``sqrt(delta) Psi + sqrt(damping) I``: the case ``pi = 1`` of the factored
    rule, whose ``pi^2`` is ``dim G / dim A`` for balanced factors. Any Kronecker product can be balanced, so that the
    rule is defined for them all; a factor of zero trace is taken as it is.

    Args:
        block: The block to be damped.
        damping: The damping, finite and not negative.

    Returns:
        A `PerFactor` shift, or ``Uniform(damping)`` for a block that is no Kronecker product.
    """
    root = math.sqrt(check_damping(damping))
    means = block.factor_means()
    if means is None:
        return Uniform(float(damping))
    ratio = split_ratio(means[0] * block.shape[-1], means[1] * block.shape[-2])
    return PerFactor(ratio * root, root / ratio)


@dataclass(frozen=True)
class TraceRestricted:
    """Damping by the block's own trace, kept above ``nu`` (Gao et al. 2020, equations 5.16 and 5.17).

    With ``s = max(nu, beta delta)`` the factors become ``sqrt(s) (Phi + I / d_in)`` and ``sqrt(s) (Psi + I / d_out)``:
    damping equals the mean eigenvalue of each factor, whatever the scale of the loss. The damping that a caller gives
    is not used then; blocks without factors (normalisation layers) take it, as `Uniform`.

    Attributes:
        nu: Least trace ``nu``, in units of the loss's curvature; the paper used 0.01 (ResNet-20) and 1 (VGG-16).
        beta: Expansion of this block's trace. The paper expands fully-connected layers by (5.17), which is a property
            of all layers together: see `expansion`.
        printed: Add ``s / d_in`` and ``s / d_out`` as (5.16) is printed, instead of ``sqrt(s)`` over them. That damping
            changes against the factors when the loss is scaled.

    Raises:
        ValueError: If ``nu`` is not positive and finite, or ``beta`` is below 1 or infinite.
    """

    nu: float = 1e-2
    beta: float = 1.0
    printed: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        for name, value, low in (("nu", self.nu, 0.0), ("beta", self.beta, 1.0)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < low or (name == "nu" and value == 0):
                raise ValueError(f"{name}={value!r} must be a number {'> 0' if name == 'nu' else '>= 1'}.")

    def __call__(self, block: Block, damping: float, /) -> Shift:
        """Decide.

        Args:
            block: The block to be damped.
            damping: Used for blocks without factors only; finite and not negative.

        Returns:
            A `Rescaled` shift, or ``Uniform(damping)`` for a block that is no Kronecker product.

        Raises:
            TypeError: The block is a Kronecker product without a scale of its own.
        """
        damping = check_damping(damping)
        if isinstance(block, ScaledKronecker):
            # A layer whose trace is expanded beyond all measure stands still, as it would without the upper end.
            scale = (block.delta * self.beta).clamp(self.nu, torch.finfo(block.delta.dtype).max ** 0.5)
            added = scale if self.printed else scale.sqrt()
            return Rescaled(scale, added / block.shape[-1], added / block.shape[-2])
        if block.factor_means() is not None:
            raise TypeError(
                f"the damping rule 'trace_restricted' needs a ScaledKronecker block, got {type(block).__name__}; use "
                "approximation='tkfac', or another rule"
            )
        return Uniform(damping)


def expansion(deltas: Iterable[Tensor], nu: float) -> float:
    """Compute ``beta = max_l max(nu, delta_l) / delta_l``, by which fully-connected layers expand (equation 5.17).

    Args:
        deltas: ``delta`` of every layer, of any shape.
        nu: Least trace.

    Returns:
        At least 1. Layers whose trace is zero, without any signal, are left out.
    """
    smallest = min((float(d[d > 0].min()) for d in deltas if bool((d > 0).any())), default=math.inf)
    return max(1.0, nu / smallest)
