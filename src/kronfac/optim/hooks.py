"""Hooks on a user's modules that keep nothing alive and follow no copy."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class WeakHook:
    """A hook that calls a method of its owner, as long as there is one.

    It does not keep the owner alive, and does nothing on a copied or pickled module.

    Args:
        owner: Whose method it is.
        method: The method's name.
        module: The module that the hook is registered on, which is not handed on.
        *first: Arguments before the hook's own.
    """

    def __init__(self, owner: object, method: str, module: nn.Module, *first: Any) -> None:
        self._owner, self._method, self._module, self._first = weakref.ref(owner), method, weakref.ref(module), first

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Call the method.

        Args:
            module: The module whose hooks run.
            *args: The hook's arguments.
        """
        owner = self._owner()
        if owner is not None and module is self._module():
            getattr(owner, self._method)(*self._first, *args)

    def __deepcopy__(self, memo: Any) -> WeakHook:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert, ()


def remove(handles: Iterable[RemovableHandle]) -> None:
    """Remove hooks.

    Args:
        handles: Of the hooks.
    """
    for handle in handles:
        handle.remove()


def _inert() -> Callable[..., None]:
    return do_nothing


def do_nothing(*args: Any) -> None:
    """Do nothing.

    Args:
        *args: Whatever.
    """
