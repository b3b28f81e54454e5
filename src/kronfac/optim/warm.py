"""What ``inverse="newton_schulz"`` can serve, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping

from kronfac.approximations import Statistic
from kronfac.blocks import Block, Inverse, KroneckerInverse, PerFactor, Rescaled, ScaledKronecker, Shift
from kronfac.damping import Rule, exact


def check_warm(statistics: Mapping[str, Statistic], rule: Rule, approximation: str) -> None:
    """Refuse what is known to need eigenvectors.

    Args:
        statistics: The layers' running statistics.
        rule: How damping is added.
        approximation: Its name.

    Raises:
        ValueError: It needs them.
    """
    if any(statistic.keeps_basis for statistic in statistics.values()):
        raise ValueError(
            f"inverse='newton_schulz' does not fit approximation={approximation!r}, whose inverses are made of "
            "eigenvectors: leave inverse out."
        )
    if rule is exact:
        raise ValueError(
            "inverse='newton_schulz' does not fit damping_rule='exact', which needs the factors' eigenvectors: use "
            "damping_rule='factored', or leave inverse out."
        )


def require_products(inverses: Mapping[str, Inverse]) -> None:
    """Refuse inverses of which none is made of inverted Kronecker factors.

    Args:
        inverses: By layer.

    Raises:
        ValueError: None is.
    """
    if inverses and not any(isinstance(inverse, KroneckerInverse) for inverse in inverses.values()):
        raise ValueError(
            "inverse='newton_schulz' renews the inverses of Kronecker factors, and no layer has any: use "
            "approximation='kfac' and damping_rule='factored', or leave inverse out."
        )


def as_product(block: Block, shift: Shift) -> tuple[Block, Shift]:
    """Write the block of TKFAC, whose factors are damped in balance, as the plain Kronecker product that it is.

    Args:
        block: A block.
        shift: What is added to it.

    Returns:
        A pair with the same inverse; the given one for other blocks, and for a scale that cannot be inverted.
    """
    if not isinstance(block, ScaledKronecker) or not bool((block.delta.isfinite() & (block.delta >= 0)).all()):
        return block, shift
    match shift:
        case PerFactor():
            return block.balanced(), shift
        case Rescaled():
            return block.balanced(shift.scale), PerFactor(shift.input, shift.output)
        case _:
            return block, shift
