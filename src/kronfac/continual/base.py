"""What every penalty can do, and sums of penalties."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from kronfac.eager import eager_root
from kronfac.vectors import listed

#: A model, or tensors by parameter name: what a penalty is evaluated on.
Parameters = nn.Module | Mapping[str, Tensor]


class Penalty(ABC):
    """A function of a model's parameters to be added to a loss: ``loss = task_loss + penalty(model)``."""

    @abstractmethod
    def __call__(self, model: Parameters) -> Tensor:
        """Evaluate, differentiably in the live parameters.

        Args:
            model: A model with parameters of the anchor's names and shapes, or ``{parameter name: tensor}``. Further
                parameters are left free.

        Returns:
            A 0-dim tensor, not negative.
        """

    @abstractmethod
    def scaled(self, factor: float) -> Penalty:
        """Multiply by a number.

        Args:
            factor: Finite, not negative.

        Returns:
            A new penalty; tensors are shared.
        """

    @abstractmethod
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Copy to another device or dtype.

        Args:
            device: The device; the present one by default.
            dtype: float32 or float64; the present one by default.

        Returns:
            A new penalty, sharing the tensors that need no conversion.
        """

    def __add__(self, other: Penalty) -> PenaltySum:
        if not isinstance(other, Penalty):
            return NotImplemented
        return PenaltySum([*_terms(self), *_terms(other)])

    def __radd__(self, other: object) -> Penalty:
        # sum(penalties) starts from 0
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __mul__(self, factor: float) -> Penalty:
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        return self.scaled(factor)

    __rmul__ = __mul__


class PenaltySum(Penalty):
    """A sum of penalties, each around its own anchor: one term for each task.

    Memory and time of a step grow with the number of terms; `QuadraticPenalty.update` keeps one anchor instead.

    Args:
        terms: The penalties.

    Attributes:
        terms: The penalties; sums among them are dissolved.

    Raises:
        ValueError: If there are none.
        TypeError: If one is no penalty.
    """

    def __init__(self, terms: Iterable[Penalty]) -> None:
        given = list(terms)
        for term in given:
            if not isinstance(term, Penalty):
                raise TypeError(f"a sum of penalties is made of penalties, got {type(term).__name__}")
        self.terms: tuple[Penalty, ...] = tuple(part for term in given for part in _terms(term))
        if not self.terms:
            raise ValueError("a sum of penalties needs at least one")

    def __call__(self, model: Parameters) -> Tensor:
        """Evaluate, differentiably in the live parameters.

        Args:
            model: As for every penalty.

        Returns:
            The sum of the terms, a 0-dim tensor.
        """
        live = live_parameters(model)
        values = [term(live) for term in self.terms]
        return torch.stack([value.to(values[0].device) for value in values]).sum()

    def scaled(self, factor: float) -> PenaltySum:
        """Multiply every term by a number.

        Args:
            factor: Finite, not negative.

        Returns:
            A new sum.
        """
        return PenaltySum(term.scaled(factor) for term in self.terms)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Copy to another device or dtype.

        Args:
            device: The device; the present one by default.
            dtype: float32 or float64; the present one by default.

        Returns:
            A new sum.
        """
        return type(self)(term.to(device, dtype) for term in self.terms)

    def __len__(self) -> int:
        return len(self.terms)

    def __repr__(self) -> str:
        return f"PenaltySum({', '.join(map(repr, self.terms))})"


def live_parameters(model: Parameters) -> dict[str, Tensor]:
    """Give a model's parameters by name.

    Args:
        model: A model, or the parameters themselves; of a model that was compiled, or wrapped for parallel runs, it is
            the module inside.

    Returns:
        ``{parameter name: tensor}``, frozen ones included.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(model, nn.Module):
        return dict(eager_root(model).named_parameters())
    if isinstance(model, Mapping):
        return dict(model)
    raise TypeError(f"model must be a torch.nn.Module or {{parameter name: tensor}}, not {type(model).__name__}")


def check_live(live: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], device: torch.device) -> None:
    """Refuse parameters that are not those of an anchor, and say which.

    Args:
        live: The parameters.
        shapes: Names and shapes that the anchor has.
        device: Where the anchor is.

    Raises:
        ValueError: If one is absent, of another shape or on another device.
    """
    faults = []
    if missing := [name for name in shapes if name not in live]:
        unknown = [name for name in live if name not in shapes]
        there = f" (it has {listed(unknown)}, which the penalty does not know)" if unknown else ""
        faults.append(f"the model lacks {listed(missing)}{there}")
    faults += [
        f"{name!r} has shape {tuple(live[name].shape)} instead of {tuple(shape)}"
        for name, shape in shapes.items()
        if name in live and live[name].shape != shape
    ]
    if faults:
        raise ValueError(f"the penalty does not fit the model: {'; '.join(faults)}")
    if elsewhere := [name for name in shapes if live[name].device != device]:
        raise ValueError(
            f"the penalty is on {device} and {listed(elsewhere)} on {live[elsewhere[0]].device}: use penalty.to(device)"
        )


def check_strength(name: str, value: object) -> float:
    """Check a factor of a penalty.

    Args:
        name: What to call it.
        value: The factor.

    Returns:
        The factor.

    Raises:
        ValueError: If it is negative or not finite.
        TypeError: If it is no number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    return float(value)


def _terms(penalty: Penalty) -> tuple[Penalty, ...]:
    return penalty.terms if isinstance(penalty, PenaltySum) else (penalty,)
