"""Whether a layer and its batch norm are used as the one layer that merging makes of them, and nowhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, reduce
from typing import Any

from torch import Tensor, fx, nn

from kronfac.continual.pairs import Pair

#: What may be asked of a parameter without computing with it, such as ``x.to(layer.weight.dtype)``.
_ASKED = {"dtype", "device", "shape", "ndim", "requires_grad", "size", "dim", "numel"}


def check_uses(model: nn.Module, pairs: Iterable[Pair]) -> None:
    """Refuse pairs whose tensors the model also uses without them: merging would change them there, or leave them.

    Where the model cannot be traced (`torch.fx`), shared tensors alone are seen.

    Args:
        model: The model.
        pairs: Its layers and batch norms.

    Raises:
        ValueError: If there is such a pair; the message names it and the other use.
    """
    pairs = list(pairs)
    layers = {module for pair in pairs for module in pair.layer.modules()}
    read, holders = {id(tensor) for tensor in _read(model, pairs)}, _holders(model)
    for pair in pairs:
        # Layers may share a weight, each with its own batch norm: every one has merged weights then.
        known = ((pair.layer_name, pair.layer, layers), (pair.norm_name, pair.norm, set(pair.norm.modules())))
        for own, module, alike in known:
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                others = [key for key, holder in holders[id(tensor)] if holder not in alike]
                if not others and id(tensor) not in read:
                    continue
                tied = f"shared (tied) with {', '.join(map(repr, others))}"
                use = tied if others else f"used without calling {own!r}, as by a functional call"
                raise ValueError(
                    f"{pair.layer_name!r} and {pair.norm_name!r} cannot be merged: '{own}.{name}' is {use}, where "
                    "merged weights would be another function"
                )


@contextmanager
def called_once(model: nn.Module, pairs: Iterable[Pair]) -> Iterator[None]:
    """Watch that no forward pass calls a batch norm in train mode twice, which has statistics of each call then.

    Args:
        model: The model.
        pairs: Its layers and batch norms.

    Yields:
        Nothing.

    Raises:
        ValueError: At the end of such a forward pass.
    """  # noqa: DOC502
    calls: Counter[str] = Counter()

    def count(module: nn.Module, inputs: object, name: str) -> None:
        calls[name] += module.training

    def check(*_: object) -> None:
        if several := [name for name, times in calls.items() if times > 1]:
            raise ValueError(
                f"a forward pass called the batch norms {several} more than once, each time with other statistics, so "
                "that there are no merged weights for it: use tracked(), which averages, or call them on one batch"
            )

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(lambda *_: calls.clear()).remove)
        for pair in pairs:
            hook = partial(count, name=pair.norm_name)
            stack.callback(pair.norm.register_forward_pre_hook(hook).remove)
        stack.callback(model.register_forward_hook(check).remove)
        yield


@contextmanager
def called_together(pairs: Iterable[Pair]) -> Iterator[Callable[[], None]]:
    """Watch that each batch norm is called on what its layer gave, once for every call of the layer.

    Args:
        pairs: Layers and batch norms.

    Yields:
        A function for the end of each forward pass, which refuses other calls.

    Raises:
        ValueError: During a forward pass, if batch norm takes a linear layer's positions for the channels.
    """  # noqa: DOC502
    pairs = list(pairs)
    calls: Counter[str] = Counter()
    given: dict[str, Tensor] = {}

    def check() -> None:
        for pair in pairs:
            layer, norm = calls[pair.layer_name], calls[pair.norm_name]
            if layer != norm:
                raise ValueError(
                    f"{pair.layer_name!r} and {pair.norm_name!r} are no pair: a forward pass called the layer {layer} "
                    f"times and the batch norm {norm} times, so that one of them is used elsewhere, too"
                )
        calls.clear()
        given.clear()

    with ExitStack() as stack:
        for pair in pairs:

            def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor, pair: Pair = pair) -> None:
                calls[pair.layer_name] += 1
                given[pair.layer_name] = output

            def compare(module: nn.Module, inputs: tuple[Any, ...], pair: Pair = pair) -> None:
                calls[pair.norm_name] += 1
                output = given.pop(pair.layer_name, None)
                if isinstance(pair.layer, nn.Linear) and inputs[0] is output and output.ndim > 2:
                    raise ValueError(
                        f"{pair.layer_name!r} and {pair.norm_name!r} are no pair: of the linear layer's output "
                        f"{list(output.shape)} batch norm takes dimension 1 for the channels, which are positions; "
                        "only [N, d] has the layer's units there"
                    )

            stack.callback(pair.layer.register_forward_hook(keep).remove)
            stack.callback(pair.norm.register_forward_pre_hook(compare).remove)
        yield check


def _holders(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """The modules that have a tensor as their own, by the tensor's id."""
    found: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            found.setdefault(id(tensor), []).append((name, module))
    return found


class _Tracer(fx.Tracer):
    """Does not look into what a layer or batch norm does with its own tensors."""

    def __init__(self, pairs: Iterable[Pair]) -> None:
        super().__init__()
        self._own = {module for pair in pairs for module in (pair.layer, pair.norm)}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self._own or super().is_leaf_module(m, module_qualified_name)


def _read(model: nn.Module, pairs: Iterable[Pair]) -> list[Any]:
    """Tensors that a forward pass computes with itself, not through calls of their modules."""
    try:
        graph = _Tracer(pairs).trace(model)
    except Exception:  # as in the search for pairs
        return []
    return [
        reduce(getattr, str(node.target).split("."), model)
        for node in graph.nodes
        if node.op == "get_attr" and not all(_asks(user) for user in node.users)
    ]


def _asks(node: fx.Node) -> bool:
    name = node.args[1] if node.target is getattr else node.target if node.op == "call_method" else None
    return name in _ASKED
