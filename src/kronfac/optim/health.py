"""How the inverses of an optimiser are: condition, age, and what went wrong on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kronfac.blocks import DenseInverse, DiagonalKroneckerInverse, EigenInverse, Inverse, KroneckerInverse
from kronfac.optim.refresh import Refreshed

#: What is counted of each layer, in the order of the fields.
_COUNTS = ("retries", "failures", "iterations", "fallbacks")


@dataclass(frozen=True)
class LayerHealth:
    """State of one layer's inverse.

    Attributes:
        condition: Condition number (2-norm) of the damped block that was inverted, the worst over groups and units;
            None before there is an inverse, and for kinds of inverse that are not one factor, a Kronecker product or
            an eigendecomposition. Beyond about 1e7 float32 leaves no digit: raise the damping.
        age: Steps taken since the statistics were read that the inverse is made of; None before there is one, and for
            optimisers that renew inverses their own way.
        retries: How often a factor of this layer failed in float32 and was done again in float64.
        failures: How often it failed in float64 too.
        iterations: Iterations of Newton-Schulz that its factors have taken, with ``inverse="newton_schulz"``.
        fallbacks: How often a factor was too far from the one before then, and was inverted by Cholesky.
        cosine: With ``products="bfloat16"``, between the directions in both precisions right after the last refresh;
            None for layers that are not rounded.
    """

    condition: float | None
    age: int | None
    retries: int
    failures: int
    iterations: int = 0
    fallbacks: int = 0
    cosine: float | None = None


@dataclass
class Record:
    """What an optimiser notes about its inverses.

    Attributes:
        made: Step whose statistics each layer's inverse is made of.
        retries: Count of each layer.
        failures: Count of each layer.
        iterations: Count of each layer.
        fallbacks: Count of each layer.
    """

    made: dict[str, int] = field(default_factory=dict)
    retries: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    iterations: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)

    def renewed(self, layers: Iterable[str], step: int, found: Refreshed) -> None:
        """Note new inverses.

        Args:
            layers: Their layers.
            step: Step of their statistics.
            found: What they took.
        """
        self.made |= dict.fromkeys(layers, step)
        self.retries.update(found.retried)
        self.iterations.update(found.iterations)
        self.fallbacks.update(found.fallbacks)

    def failed(self, error: BaseException, layers: Iterable[str]) -> None:
        """Note a factorisation that failed.

        Args:
            error: It names the layer.
            layers: Names of all layers.
        """
        text = str(error)
        self.failures.update(name for name in layers if f"layer {name!r}" in text)

    def describe(self) -> dict[str, dict[str, int]]:
        """Return what :meth:`of` takes."""
        return {key: dict(getattr(self, key)) for key in ("made", *_COUNTS)}

    @classmethod
    def of(cls, saved: dict[str, dict[str, int]]) -> Record:
        """Rebuild a record.

        Args:
            saved: From :meth:`describe`.

        Returns:
            The record.
        """
        read = {key: {str(k): int(v) for k, v in saved.get(key, {}).items()} for key in ("made", *_COUNTS)}
        return cls(read["made"], *(Counter(read[key]) for key in _COUNTS))


@torch.no_grad()
def condition(inverse: Inverse) -> float | None:
    """Condition number of what an inverse inverts, from its eigenvalues in float64.

    Args:
        inverse: The inverse.

    Returns:
        The worst over its stack, infinite where rounding made it indefinite; None for other kinds.
    """
    if isinstance(inverse, KroneckerInverse):
        return float((_spread(inverse.input) * _spread(inverse.output)).max())
    if isinstance(inverse, DiagonalKroneckerInverse):
        low, high = inverse.input.double().aminmax(dim=-1)
        return float((high / low * _spread(inverse.output)).max())
    if isinstance(inverse, DenseInverse):
        return float(_spread(inverse.matrix).max())
    if isinstance(inverse, EigenInverse):
        flat = inverse.reciprocals.double().flatten(-2)
        return float((flat.amax(-1) / flat.amin(-1)).max())
    return None


def _spread(matrix: Tensor) -> Tensor:
    values = torch.linalg.eigvalsh(matrix.double())
    least, greatest = values[..., 0], values[..., -1]
    return torch.where(least > 0, greatest / least, torch.inf)
