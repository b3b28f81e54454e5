"""What lies behind what in the graph that autograd records."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge, saved_tensors_hooks

#: What runs the forward of every `torch.autograd.Function`.
_APPLY = vars(torch.autograd.Function)["apply"].__func__.__code__

#: Operations on each entry by itself.
_BY_ENTRY = frozenset(
    [
        "Abs",
        "Add",
        "Addcdiv",
        "Addcmul",
        "Clamp",
        "Div",
        "Exp",
        "Lerp",
        "Log",
        "MaskedFill",
        "Mul",
        "Neg",
        "Pow",
        "Relu",
        "Rsub",
        "Sigmoid",
        "Softplus",
        "Sqrt",
        "Sub",
        "Tanh",
        "Where",
    ]
)

_Key = TypeVar("_Key", bound=Hashable)


def in_backward() -> bool:
    """Whether a derivative is being computed in this thread: a forward now is a checkpoint's second one.

    Returns:
        True within PyTorch's engine.
    """
    return bool(torch._C._current_graph_task_id() != -1)


def in_function() -> bool:
    """Whether the forward of a `torch.autograd.Function` is under way, whose derivative may call the layers again.

    Returns:
        True within re-entrant checkpoints, for instance.
    """
    frame = sys._getframe()
    while frame.f_code is not _APPLY:
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return True


def differentiates_in(parameters: Iterable[Tensor]) -> bool:
    """Whether the derivative that is being computed in this thread is one in any of these parameters.

    Args:
        parameters: Leaves of the graph.

    Returns:
        True for `backward()`, and for `torch.autograd.grad` where one of them is among its inputs.
    """
    return any(_executes(get_gradient_edge(parameter).node) for parameter in parameters if parameter.requires_grad)


def _executes(node: Node) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf that `torch.autograd.grad` was asked for, which is not executed but handed out
        return True


def saved_plainly() -> AbstractContextManager[None]:
    """Keep what is computed within the block from hooks on saved tensors, such as a checkpoint's, which counts them.

    Returns:
        A context manager.
    """
    return saved_tensors_hooks(torch.Tensor.detach, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def last_of(outputs: Tensor, nodes: Mapping[_Key, Node]) -> list[_Key]:
    """Find the nodes at which a pull from the outputs ends.

    Args:
        outputs: A model's outputs, attached to the graph.
        nodes: Nodes by name.

    Returns:
        Names of those behind which none of the others lies, and of those that the outputs do not depend on.
    """
    known = set(nodes.values())
    below: dict[Node | None, bool] = {}  # whether one of them lies at or behind a node
    stack = [outputs.grad_fn]
    while stack:
        node = stack[-1]
        following = [n for n, _ in node.next_functions if n is not None] if node is not None else []
        waiting = [n for n in following if n not in below]
        if waiting:
            stack += waiting
            continue
        stack.pop()
        below[node] = node in known or any(below[n] for n in following)
    behind = {node for node in known if any(below.get(n, False) for n, _ in node.next_functions if n is not None)}
    return [name for name, node in nodes.items() if node not in behind or node not in below]


def feeders_of(outputs: Tensor, nodes: Mapping[str, Node]) -> dict[str | None, set[str]]:
    """Find what each node depends on directly, not through another one of them.

    Args:
        outputs: A model's outputs, attached to the graph; their entry is ``None``, the last.
        nodes: Nodes by name.

    Returns:
        Names by name, in the order of the nodes.
    """
    names = {node: name for name, node in nodes.items()}

    def behind(start: Node) -> set[str]:
        found: set[str] = set()
        stack, met = [start], {start}
        while stack:
            for node, _ in stack.pop().next_functions:
                if node is None or node in met:
                    continue
                met.add(node)
                if node in names:
                    found.add(names[node])
                else:
                    stack.append(node)
        return found

    feeders: dict[str | None, set[str]] = {name: behind(node) for name, node in nodes.items()}
    last = outputs.grad_fn
    if last is not None:
        feeders[None] = {names[last]} if last in names else behind(last)
    return feeders


def unreached(outputs: Tensor, nodes: Mapping[_Key, Node]) -> set[_Key]:
    """Find the nodes that the outputs do not depend on.

    Args:
        outputs: A model's outputs, attached to the graph.
        nodes: Nodes by name.

    Returns:
        Their names.
    """
    met = _users(outputs)[1]
    return {name for name, node in nodes.items() if node not in met}


def used_elsewhere(
    outputs: Tensor, layers: Mapping[str, tuple[Collection[Node], Iterable[Tensor]]], empty: Collection[Node] = ()
) -> list[str]:
    """Find layers whose parameters the outputs depend on in another way than through the layer's calls.

    Args:
        outputs: A model's outputs, attached to the graph.
        layers: The nodes of a layer's outputs, one for each call, and its trained parameters, by name.
        empty: Nodes of tensors without entries, through which nothing depends on anything.

    Returns:
        Names of the layers that have such a parameter.
    """
    users, met = _users(outputs, empty)

    def elsewhere(calls: Collection[Node], parameters: Iterable[Tensor]) -> bool:
        most = sum(node in met for node in calls)
        return any(_products(get_gradient_edge(p).node, calls, p.shape, users) > most for p in parameters)

    return [name for name, (calls, parameters) in layers.items() if elsewhere(calls, parameters)]


@contextmanager
def without_sinks(outputs: Tensor) -> Iterator[None]:
    """Pull from outputs of `DistributedDataParallel` within the block without starting its exchange of gradients.

    With ``static_graph=True`` the first backward through its outputs makes it reduce all gradients at the end, whatever
    is differentiated; those of the loss would then never be.

    Args:
        outputs: What is pulled from, attached to the graph.

    Yields:
        Nothing.
    """
    sinks = [node for node in _users(outputs)[1] if node.name() == "_DDPSinkBackward"] if _distributed() else []
    wrappers = {id(model): model for node in sinks if (model := node.ddp_weakref()) is not None}  # type: ignore[attr-defined]
    waiting = [model for model in wrappers.values() if not model._static_graph_delay_allreduce_enqueued]
    for model in waiting:
        model._static_graph_delay_allreduce_enqueued = True
    try:
        yield
    finally:
        for model in waiting:
            model._static_graph_delay_allreduce_enqueued = False


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


# No function within another: one that calls itself is a cycle, which keeps the graph until the next collection.
def _products(node: Node, calls: Collection[Node], shape: torch.Size, users: Mapping[Node, list[Node]]) -> float:
    """Count the products that a parameter is part of, past its casts and transposes; infinite for a function of it."""
    count = 0.0
    for user in users.get(node, []):
        if user not in calls and _is_function(user, shape):
            return math.inf
        ends = user in calls or len(user.next_functions) > 1
        count += 1 if ends else _products(user, calls, shape, users)
    return count


def _is_function(node: Node, shape: torch.Size) -> bool:
    """Whether a node makes another tensor of a parameter's shape out of it, entry by entry."""
    name = node.name().rstrip("0123456789").removesuffix("Backward")
    return name in _BY_ENTRY and sorted(node._input_metadata[0].shape) == sorted(shape)


def users_of(outputs: Tensor, empty: Collection[Node] = ()) -> dict[Node, list[Node]]:
    """For each node behind the outputs find those that use it.

    Args:
        outputs: A model's outputs, attached to the graph.
        empty: Nodes of tensors without entries, which use nothing.

    Returns:
        The users, once for each use.
    """
    return _users(outputs, empty)[0]


def _users(outputs: Tensor, empty: Collection[Node] = ()) -> tuple[dict[Node, list[Node]], set[Node]]:
    """For each node behind the outputs those that use it, once for each use; and all nodes. Empty ones use nothing."""
    users: dict[Node, list[Node]] = {}
    stack = [] if outputs.grad_fn is None else [outputs.grad_fn]
    met = set(stack)
    while stack:
        node = stack.pop()
        for used, _ in () if node in empty else node.next_functions:
            if used is not None:
                users.setdefault(used, []).append(node)
                if used not in met:
                    met.add(used)
                    stack.append(used)
    return users, met


def output_edge(output: Tensor) -> tuple[GradientEdge, bool]:
    """Find where a layer's output entered the graph, whatever is done to it in place later.

    Args:
        output: The output.

    Returns:
        The edge, whose derivative has the output's entries in their order, and whether no change in place can cut it
        off: that of the output itself, or, for a view of a whole tensor in another shape, of that tensor.
    """
    base = output._base
    if base is None:
        return get_gradient_edge(output), True
    same = base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    if same and base.requires_grad:
        return get_gradient_edge(base), True
    return get_gradient_edge(output), False
