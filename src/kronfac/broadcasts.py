"""Where what has no dimension of examples, such as embeddings of positions, is added to what has one.

The derivative in the sum, ``[B, T, d]``, holds for each example what the derivative in the summand adds up over all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.autograd.graph import GradientEdge, Node

#: Nodes that hand a derivative on as it is but for dimensions of length 1; a sum does where it is scaled by 1.
_HAND_ON = frozenset(["Add", "Alias", "Clone", "Expand", "Repeat", "ToCopy", "Unsqueeze", "UnsafeView", "View"])


def meeting_of(
    node: Node, shape: torch.Size, batch: int, users: Mapping[Node, list[Node]]
) -> tuple[GradientEdge, torch.Size] | None:
    """Find where a tensor is broadcast over the examples.

    Args:
        node: What made it.
        shape: Its shape ``[1, *rest]`` or ``rest``.
        batch: Number of examples.
        users: For each node those that use it, once for each use.

    Returns:
        The edge of what is then there, and its shape ``[batch, *rest]``; None if the tensor is used otherwise before.
    """
    wanted = {(batch, *shape), (batch, *shape[1:]) if shape[0] == 1 else ()}
    while len(following := users.get(node, [])) == 1:
        (node,) = following
        name = node.name().rstrip("0123456789").removesuffix("Backward")
        if name not in _HAND_ON or getattr(node, "_saved_alpha", 1) != 1:
            return None
        made = node._input_metadata[0].shape
        if tuple(made) in wanted:
            return GradientEdge(node, 0), torch.Size(made)
        if _without_ones(made) != _without_ones(shape):
            return None
    return None


def _without_ones(shape: torch.Size) -> list[int]:
    return [size for size in shape if size != 1]
