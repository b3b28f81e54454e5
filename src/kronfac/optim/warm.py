"""What options for the inverses of Kronecker factors can serve, and what they refuse."""

from __future__ import annotations

from collections.abc import Mapping

from kronfac.approximations import Statistic
from kronfac.blocks import Block, Inverse, KroneckerInverse, PerFactor, Rescaled, ScaledKronecker, Shift
from kronfac.damping import Rule, exact


def check_factors(option: str, statistics: Mapping[str, Statistic], rule: Rule, approximation: str) -> None:
    """Refuse what is known to need eigenvectors.

    Args:
        option: The option with its value.
        statistics: The layers' running statistics.
        rule: How damping is added.
        approximation: Its name.

    Raises:
        ValueError: It needs them.
    """
    name = option.partition("=")[0]
    if any(statistic.keeps_basis for statistic in statistics.values()):
        raise ValueError(
            f"{option} does not fit approximation={approximation!r}, whose inverses are made of "
            f"eigenvectors: leave {name} out."
        )
    if rule is exact:
        raise ValueError(
            f"{option} does not fit damping_rule='exact', which needs the factors' eigenvectors: use "
            f"damping_rule='factored', or leave {name} out."
        )


def require_products(option: str, inverses: Mapping[str, Inverse]) -> None:
    """Refuse inverses of which none is made of inverted Kronecker factors.

    Args:
        option: The option with its value.
        inverses: By layer.

    Raises:
        ValueError: None is.
    """
    if inverses and not any(isinstance(inverse, KroneckerInverse) for inverse in inverses.values()):
        raise ValueError(
            f"{option} is for the inverses of Kronecker factors, and no layer has any: use approximation='kfac' and "
            f"damping_rule='factored', or leave {option.partition('=')[0]} out."
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
