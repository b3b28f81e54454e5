"""How much is added to a block before it is inverted.

A shift says *what* is added; a rule of `kronfac.damping` decides *how much*. Blocks know how to solve with a shift and
refuse those that mean nothing for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


class Shift:
    """Base of everything a block can be asked to add to itself before it is inverted."""


@dataclass(frozen=True)
class Uniform(Shift):
    """Add ``value * I`` to the whole block: the inverse is that of ``C + value I``, exactly.

    Attributes:
        value: The damping, finite and not negative.

    Raises:
        ValueError: If ``value`` is negative, infinite or NaN.
    """

    value: float

    def __post_init__(self) -> None:
        """Validate."""
        _check("value", self.value)


@dataclass(frozen=True, eq=False)
class PerFactor(Shift):
    """Add ``input * I`` to the input factor and ``output * I`` to the output factor of a Kronecker product.

    The inverse is that of ``(G + output I) x (A + input I)`` (Martens & Grosse 2015, section 6.3), which is not ``C``
    plus a multiple of the identity.

    Attributes:
        input: What is added to the input factor: a number, or a tensor with one entry per stack element.
        output: The same for the output factor.

    Raises:
        ValueError: If an entry is negative, infinite or NaN.
    """

    input: Tensor | float
    output: Tensor | float

    def __post_init__(self) -> None:
        """Validate."""
        _check("input", self.input)
        _check("output", self.output)


@dataclass(frozen=True, eq=False)
class Rescaled(Shift):
    """Replace the scale of ``delta (Psi x Phi)``, and add to its balanced factors (Gao et al. 2020, equation 5.16).

    The inverse is that of ``(sqrt(scale) Psi + output I) x (sqrt(scale) Phi + input I)``.

    Attributes:
        scale: What takes the place of the block's ``delta``, one entry per stack element.
        input: What is added to ``sqrt(scale) Phi``, one entry per stack element.
        output: The same for ``sqrt(scale) Psi``.

    Raises:
        ValueError: If an entry is negative, infinite or NaN.
    """

    scale: Tensor
    input: Tensor
    output: Tensor

    def __post_init__(self) -> None:
        """Validate."""
        for name in ("scale", "input", "output"):
            _check(name, getattr(self, name))


def _check(name: str, value: Tensor | float) -> None:
    if isinstance(value, Tensor):
        if not bool((value.isfinite() & (value >= 0)).all()):
            raise ValueError(f"a shift must be finite and not negative, got {name}={value}")
    elif not (math.isfinite(value) and value >= 0):
        raise ValueError(f"a shift must be finite and not negative, got {name}={value}")
