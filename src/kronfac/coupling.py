"""Where batch norm in train mode couples the examples of a batch, read off the autograd graph of a forward pass.

The graph, not the list of modules, says what lies behind a layer: branches, functional calls and modules that the
forward skips are seen as they ran. Only PyTorch's own batch-norm operations are known; a mean over the batch written
by hand is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from kronfac.tape import Tape


class Coupling(IntEnum):
    """How an example's loss depends on another example's output of a layer.

    Attributes:
        NONE: Not at all: no batch norm in train mode lies between the layer and the outputs.
        DIRECT: Through batch norm, which takes the layer's output and is all that does: the derivatives of any loss in
            the layer's outputs then add up to zero over batch and positions.
        GENERAL: Through batch norm somewhere behind the layer.
    """

    NONE = 0
    DIRECT = 1
    GENERAL = 2


def couplings(tape: Tape, outputs: Tensor) -> dict[str, Coupling]:
    """Say for every recorded layer that the outputs depend on how batch norm couples the examples behind it.

    Args:
        tape: A recorded forward pass.
        outputs: The model's outputs, attached to the graph.

    Returns:
        Coupling by layer name; layers that the outputs do not depend on are left out.
    """
    if outputs.grad_fn is None:
        return {}
    nodes = _reachable([outputs.grad_fn])
    norms = {node for node in nodes if _couples(node)}
    behind = _reachable([follower for node in norms for follower in _following(node)])
    users: dict[Any, list[Any]] = {}
    for node in nodes:
        for follower in _following(node):
            users.setdefault(follower, []).append(node)

    def feeds_norms_alone(node: Any) -> bool:
        found = users.get(node, [])
        return bool(found) and all(
            # A cast, as under autocast, keeps sums; everything else may weigh the examples differently.
            (user in norms and user.next_functions[0][0] is node)
            or (user.name() == "ToCopyBackward0" and feeds_norms_alone(user))
            for user in found
        )

    found: dict[str, Coupling] = {}
    for name, call in tape.calls.items():
        node = call.edge.node
        if node not in nodes:
            continue
        direct = node is not outputs.grad_fn and feeds_norms_alone(node)
        found[name] = (Coupling.DIRECT if direct else Coupling.GENERAL) if node in behind else Coupling.NONE
    return found


def _couples(node: Any) -> bool:
    """Whether a node is batch norm that normalises by the batch's own statistics."""
    if "BatchNorm" not in node.name():
        return False
    # Instance norm runs the same operation over one "example" whose channels are those of all examples.
    one_example = node._input_metadata[0].shape[0] == 1
    return bool(getattr(node, "_saved_training", True)) and not one_example


def _following(node: Any) -> list[Any]:
    return [follower for follower, _ in node.next_functions if follower is not None]


def _reachable(start: Iterable[Any]) -> set[Any]:
    """The nodes themselves and all that are reached from them."""
    met = set(start)
    stack = list(met)
    while stack:
        for follower in _following(stack.pop()):
            if follower not in met:
                met.add(follower)
                stack.append(follower)
    return met
