"""Which layer stands right before which batch norm."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import fx, nn

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def find_pairs(model: nn.Module, norms: Sequence[str]) -> dict[str, str]:
    """Find the layers whose outputs go to a batch norm and nowhere else.

    Args:
        model: The model.
        norms: Names of its batch norms.

    Returns:
        ``{layer's name: batch norm's name}``, of those that were found.
    """
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # tracing runs the model's own code on stand-ins, and that may fail in any way
        return _in_sequences(model, norms)
    modules = dict(model.named_modules())
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    found = {}
    for norm in norms:
        uses = calls.get(norm, [])
        source = uses[0].args[0] if len(uses) == 1 and uses[0].args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        layer = str(source.target)
        if isinstance(modules.get(layer), _LAYERS) and len(calls[layer]) == 1:
            found[layer] = norm
    return found


def _in_sequences(model: nn.Module, norms: Sequence[str]) -> dict[str, str]:
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        prefix = f"{name}." if name else ""
        for (first, layer), (second, _) in pairwise(module.named_children()):
            if isinstance(layer, _LAYERS) and prefix + second in norms:
                found[prefix + first] = prefix + second
    return found
