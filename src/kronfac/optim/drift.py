"""How far the factors have moved since they were inverted."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from kronfac.approximations import Statistic
from kronfac.blocks import Inverse, Kronecker, KroneckerInverse, PerFactor
from kronfac.damping import Rule
from kronfac.optim.refresh import damped_blocks
from kronfac.optim.warm import as_product


def largest_drift(
    inverses: Mapping[str, Inverse],
    statistics: Mapping[str, Statistic],
    damping: Callable[[str], float],
    rule: Rule | Mapping[str, Rule],
) -> float:
    """Largest ``|tr((C + sI) (C' + s'I)⁻¹) / d − 1|`` over all factors ``C`` of width ``d``, ``C'`` the one inverted.

    That is the mean relative change of the damped factor's eigenvalues as the old inverse sees them, the same in any
    coordinates. It takes one sum over the entries of each factor. Layers whose inverse is no Kronecker product, such as
    normalisation, are left out.

    Args:
        inverses: Inverses by layer.
        statistics: The layers' running statistics.
        damping: Damping of a layer.
        rule: How it is added: a rule for all layers, or one for each by name.

    Returns:
        The drift; not finite where a factor is not.

    Raises:
        ValueError: No layer has factors and a Kronecker inverse.
    """
    found = []
    for name, inverse in inverses.items():
        if not isinstance(inverse, KroneckerInverse) or name not in statistics:
            continue
        block, shift = as_product(*damped_blocks([name], statistics, damping, rule)[name])
        if not (isinstance(block, Kronecker) and isinstance(shift, PerFactor)):
            continue
        for new, old, added in (
            (block.input, inverse.input, shift.input),
            (block.output, inverse.output, shift.output),
        ):
            trace = (new * old).sum((-2, -1)) + added * old.diagonal(dim1=-2, dim2=-1).sum(-1)
            found.append((trace / new.shape[-1] - 1.0).abs().max())
    if not found:
        raise ValueError(
            "drift looks at Kronecker factors and their inverses, and no layer has both: use approximation='kfac' and "
            "damping_rule='factored', or leave drift out."
        )
    return float(torch.stack(found).max())
