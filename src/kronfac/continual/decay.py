"""Weight decay towards a starting point instead of towards zero (L2-SP)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Self

import torch
from torch import Tensor

from kronfac.continual.base import Parameters, Penalty, check_live, check_strength, live_parameters
from kronfac.vectors import listed


class RecentredDecay(Penalty):
    """``½ strength |θ - θ*|²``; made by `recentred_decay`.

    Args:
        anchor: ``θ*`` by parameter name; not copied.
        strength: The factor, not negative.

    Attributes:
        anchor: ``θ*`` by parameter name.
        strength: The factor.

    Raises:
        ValueError: If there is no parameter, or the strength is negative or not finite.
    """

    def __init__(self, anchor: Mapping[str, Tensor], strength: float) -> None:
        if not anchor:
            raise ValueError("weight decay needs at least one parameter")
        self.anchor = dict(anchor)
        self.strength = check_strength("strength", strength)

    def __call__(self, model: Parameters) -> Tensor:
        """Evaluate, differentiably in the live parameters.

        Args:
            model: As for every penalty.

        Returns:
            ``½ strength |θ - θ*|²``, a 0-dim tensor in the anchor's dtype, and real.
        """
        live = live_parameters(model)
        first = next(iter(self.anchor.values()))
        check_live(live, {name: tensor.shape for name, tensor in self.anchor.items()}, first.device)
        squares = [_square(live[name].to(start.dtype) - start) for name, start in self.anchor.items()]
        return torch.stack([square.to(first.dtype.to_real()) for square in squares]).sum() * (0.5 * self.strength)

    def scaled(self, factor: float) -> RecentredDecay:
        """Multiply by a number.

        Args:
            factor: Finite, not negative.

        Returns:
            A new penalty.
        """
        return RecentredDecay(self.anchor, self.strength * check_strength("factor", factor))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Copy to another device or dtype.

        Args:
            device: The device; the present one by default.
            dtype: float32 or float64; the present one by default.

        Returns:
            A new penalty.
        """

        def kind(tensor: Tensor) -> torch.dtype | None:
            return dtype.to_complex() if dtype is not None and tensor.is_complex() else dtype

        return type(self)({n: t.to(device=device, dtype=kind(t)) for n, t in self.anchor.items()}, self.strength)

    def __repr__(self) -> str:
        return f"RecentredDecay({len(self.anchor)} parameters, strength={self.strength:g})"


def recentred_decay(model: Parameters, strength: float, *, names: Iterable[str] | None = None) -> RecentredDecay:
    """Weight decay towards the parameters of this moment: ``½ strength |θ - θ*|²``.

    Added to a quadratic penalty around the same point it is the damping of its curvature (Lee et al. 2020).

    Args:
        model: The model; its trainable parameters of this moment are the centre.
        strength: The factor, not negative.
        names: Parameters to restrict it to; all trainable ones by default.

    Returns:
        The penalty.

    Raises:
        ValueError: If there is no such parameter, or the strength is negative or not finite.
    """
    live = live_parameters(model)
    chosen = [name for name, p in live.items() if p.requires_grad] if names is None else list(dict.fromkeys(names))
    if unknown := [name for name in chosen if name not in live]:
        raise ValueError(f"the model has no parameters {listed(unknown)}")
    if live and names is None and not chosen:
        raise ValueError(
            "none of the tensors requires a gradient, and weight decay takes those that do: pass live parameters, or "
            "choose with names="
        )
    return RecentredDecay(snapshot({name: live[name] for name in chosen}), strength)


def _square(delta: Tensor) -> Tensor:
    """The squared norm."""
    return (torch.view_as_real(delta) if delta.is_complex() else delta).square().sum()


def snapshot(parameters: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Copy parameters, in float32 at least.

    Args:
        parameters: By name.
        dtype: The dtype of the copy; by default the parameter's own, float32 below that.

    Returns:
        Copies without a graph.
    """
    return {
        name: p.detach().to(dtype or torch.promote_types(p.dtype, torch.float32), copy=True)
        for name, p in parameters.items()
    }
