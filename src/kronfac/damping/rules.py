"""Rules that turn one damping number into what is added to a block.

A rule is a function ``(block, damping) -> Shift``. It reads the block's traces and knows nothing of how the block is
stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from kronfac.blocks import Block, PerFactor, Shift, Uniform


@runtime_checkable
class Rule(Protocol):
    """Anything that decides what to add to a block."""

    def __call__(self, block: Block, damping: float, /) -> Shift:
        """Decide.

        Args:
            block: The block to be damped.
            damping: The damping, finite and not negative.

        Returns:
            What to add.
        """
        ...


def factored(block: Block, damping: float) -> Shift:
    """Split the damping between the two factors (Martens & Grosse 2015, section 6.3).

    ``A + pi sqrt(damping) I`` and ``G + sqrt(damping) / pi I`` with ``pi^2 = (tr A / dim A) / (tr G / dim G)``, for
    each stack element. A factor of zero trace says nothing about the split: ``pi = 1`` then.

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
    pi = split_ratio(*means)
    return PerFactor(pi * root, root / pi)


@dataclass(frozen=True)
class EachFactor:
    """Add one number to the eigenvalues of each Kronecker factor, whatever damping and decay are (Puiu 2022, 7.1).

    Unlike `factored` it looks neither at the sizes of the factors nor at the damping, to which a weight decay adds. A
    block that is no Kronecker product gets the square, which is what this adds at least to a product.

    Attributes:
        value: What is added.

    Raises:
        ValueError: If it is negative, infinite or NaN.
    """

    value: float

    def __post_init__(self) -> None:
        """Validate."""
        check_damping(self.value)

    def __call__(self, block: Block, damping: float, /) -> Shift:
        """Decide.

        Args:
            block: The block to be damped.
            damping: Not used.

        Returns:
            What to add.
        """
        if block.factor_means() is None:
            return Uniform(self.value**2)
        return PerFactor(self.value, self.value)


def split_ratio(input: Tensor, output: Tensor) -> Tensor:
    """Root of the ratio of two sizes, by which damping is split between two factors.

    Args:
        input: Size of the input factor, shape ``[*stack]``.
        output: Size of the output factor.

    Returns:
        ``sqrt(input / output)``, or 1 where one of them is zero or the ratio leaves the range of numbers.
    """
    usable = (input > 0) & (output > 0)
    ratio = torch.where(usable, (input / output).sqrt(), torch.ones_like(input))
    # A ratio that over- or underflows is no split either, and must not become a shift of zero or infinity.
    return torch.where(ratio.isfinite() & (ratio > 0), ratio, torch.ones_like(ratio))


def exact(block: Block, damping: float) -> Shift:
    """Add the damping to the block itself; a Kronecker product is then inverted through its eigenvectors.

    Args:
        block: The block to be damped.
        damping: The damping, finite and not negative.

    Returns:
        ``Uniform(damping)``.
    """
    return Uniform(check_damping(damping))


def check_damping(damping: float) -> float:
    """Validate a damping.

    Args:
        damping: The damping.

    Returns:
        It, as a float.

    Raises:
        ValueError: If it is negative, infinite or NaN.
        TypeError: If it is no number, or a tensor whose gradient would be lost.
    """
    if isinstance(damping, Tensor):
        wanted, damping = damping.requires_grad and torch.is_grad_enabled(), damping.detach()
        if wanted:
            raise TypeError(
                f"damping={damping} is a tensor that requires a gradient, but an inverse and its log-determinant are "
                "no functions of it that autograd could follow: pass a plain number"
            )
    if isinstance(damping, (bool, str)):
        raise TypeError(f"damping must be a number, got {damping!r}")
    try:
        value = float(damping)
    except (TypeError, ValueError) as error:
        raise TypeError(f"damping must be a number, got {damping!r}") from error
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"damping must be finite and not negative, got {value}")
    return value


#: Rules by name.
RULES: dict[str, Rule] = {"factored": factored, "exact": exact}


def get_rule(rule: str | Rule) -> Rule:
    """Find a rule by name.

    Args:
        rule: A name, or a rule, which is given back.

    Returns:
        The rule.

    Raises:
        ValueError: If there is no rule of that name.
        TypeError: If it is neither a name nor callable.
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(
                f"unknown damping rule {rule!r}; accepted: {', '.join(map(repr, RULES))}, or a function of your own"
            )
        return RULES[rule]
    if not callable(rule):
        raise TypeError(f"a damping rule is a name or a function (block, damping) -> Shift, got {rule!r}")
    return rule
