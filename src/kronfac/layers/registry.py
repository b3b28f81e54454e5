"""``adapt``: from a module to its adapter, by type; subclasses inherit, unless they compute something of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch

from torch import nn

from kronfac.layers.base import LayerAdapter, UnsupportedLayer

#: Adapters of other libraries' classes, by module and name; a class is registered when a layer of it is met.
BY_NAME: dict[str, Callable[..., LayerAdapter]] = {}


@singledispatch
def adapt(module: nn.Module, name: str, sharing: str = "expand") -> LayerAdapter:
    """Return the adapter of one layer; register a new layer type with ``@adapt.register``.

    Args:
        module: The layer.
        name: Its name within the model.
        sharing: ``"expand"`` or ``"reduce"``.

    Raises:
        UnsupportedLayer: There is no exact adapter for this module; the text says why.
    """
    for kind in type(module).__mro__:
        if (known := BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")) is not None:
            adapt.register(kind, known)
            return known(module, name, sharing)
    raise UnsupportedLayer(f"no adapter for layers of type {type(module).__name__}")


#: Methods that say what PyTorch's layers compute: forwards of some leave it to another one.
_COMPUTES = ("forward", "_conv_forward", "_apply_instance_norm")


def runs_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what a class computes: a subclass with a ``forward`` of its own may not.

    Args:
        module: The module.
        kind: The class.

    Returns:
        True if so.
    """
    same = (getattr(type(module), name, None) is getattr(kind, name, None) for name in _COMPUTES)
    return isinstance(module, kind) and all(same) and vars(module).keys().isdisjoint(_COMPUTES)


def require_known_forward(module: nn.Module) -> None:
    """Refuse a layer that computes something of its own.

    Args:
        module: The layer; its class or one that it inherits from has an adapter.

    Raises:
        UnsupportedLayer: Its ``forward`` is not that of the class whose adapter it inherits.
    """
    kind = next(kind for kind in type(module).__mro__ if kind in adapt.registry)
    if not runs_as(module, kind):
        name, parent = type(module).__name__, kind.__name__
        raise UnsupportedLayer(
            f"{name} has a forward of its own, so that {parent}'s formulas may not be its; if they are, say so by "
            f"kronfac.layers.adapt.register({name}, kronfac.layers.adapt.dispatch({parent}))"
        )
