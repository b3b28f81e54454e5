"""Where batch norm in train mode couples the examples of a batch, read off the autograd graph of a forward pass.

The graph, not the list of modules, says what lies behind a layer: branches, functional calls and modules that the
forward skips are seen as they ran. Only PyTorch's own batch-norm operations are known; a mean over the batch written
by hand is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from kronfac.layers.conv import ConvAdapter

if TYPE_CHECKING:
    from kronfac.tape import Call, Tape


class Coupling(IntEnum):
    """How an example's loss depends on another example's output of a layer.

    Attributes:
        NONE: Not at all: no batch norm in train mode lies between the layer and the outputs.
        DIRECT: Through batch norm over the layer's units, which takes the layer's output and is all that does: the
            derivatives of any loss in the layer's outputs then add up to zero over batch and positions.
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
    norms = {node for node in nodes if _couples(node, len(outputs))}
    behind = _reachable([follower for node in norms for follower in _following(node)])
    users: dict[Any, list[Any]] = {}
    for node in nodes:
        for follower in _following(node):
            users.setdefault(follower, []).append(node)

    found: dict[str, Coupling] = {}
    for name, call in tape.calls.items():
        node = call.edge.node
        if node not in nodes:
            continue
        direct = node is not outputs.grad_fn and _units_are_channels(call) and _feeds_alone(node, norms, users)
        found[name] = (Coupling.DIRECT if direct else Coupling.GENERAL) if node in behind else Coupling.NONE
    return found


def _feeds_alone(node: Any, norms: set[Any], users: Mapping[Any, list[Any]]) -> bool:
    """Whether a node's output goes into batch norm, and nowhere else."""
    found = users.get(node, [])
    return bool(found) and all(
        # A cast, as under autocast, keeps sums; everything else may weigh the examples differently.
        (user in norms and user.next_functions[0][0] is node)
        or (user.name() == "ToCopyBackward0" and _feeds_alone(user, norms, users))
        for user in found
    )


def refuse_synchronised(model: nn.Module, name: str) -> None:
    """Refuse batch norm that couples the examples of several processes.

    Args:
        model: The model.
        name: The approximation's name.

    Raises:
        ValueError: There is one in train mode.
    """
    for key, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and module.training:
            raise ValueError(
                f"approximation={name!r}: {key!r} is an nn.SyncBatchNorm in train mode, which couples examples of "
                f"different processes; use nn.BatchNorm, or approximation='kfac'."
            )


def _units_are_channels(call: Call) -> bool:
    """Whether dimension 1, which batch norm takes for the channels, holds the layer's units and not its positions."""
    return len(call.output_shape) == 2 or isinstance(call.adapter, ConvAdapter)


def _couples(node: Any, batch: int) -> bool:
    """Whether a node is batch norm that normalises by the batch's own statistics."""
    if "BatchNorm" not in node.name() or not getattr(node, "_saved_training", True):
        return False
    return not _is_instance_norm(node, batch)


def _is_instance_norm(node: Any, batch: int) -> bool:
    """Whether a batch norm is instance norm: the same operation over one example with the channels of all."""
    # One example alone does not show it: [1, C, N] is batch norm over N examples. The view of [N, C, …] before it does.
    one, *rest = node._input_metadata[0].shape
    before = node.next_functions[0][0]
    if one != 1 or before is None or before.name() != "ViewBackward0":
        return False
    sizes = list(before._saved_self_sym_sizes)
    # Layers may have moved positions into the examples, whose number is then a multiple of the batch.
    return len(sizes) > 1 and sizes[0] % batch == 0 and [sizes[0] * sizes[1], *sizes[2:]] == rest


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
