"""Hooks on a user's modules that keep nothing alive and follow no copy."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

#: Whether the hook that runs was met in code that ``torch.compile`` was compiling or has compiled.
_COMPILED: ContextVar[bool] = ContextVar("kronfac_hook_in_compiled_code", default=False)


def in_compiled_region() -> bool:
    """Whether the present hook belongs to a module that is called within a compiled function or module."""
    return _COMPILED.get()


class WeakHook:
    """A hook that calls a method of its owner, as long as there is one.

    It does not keep the owner alive, and does nothing on a copied or pickled module. `torch.compile` leaves it out of
    its graphs, which end before it.

    Args:
        owner: Whose method it is.
        method: The method's name.
        module: The module that the hook is registered on, which is not handed on.
        *first: Arguments before the hook's own.
    """

    def __init__(self, owner: object, method: str, module: nn.Module, *first: Any) -> None:
        self._owner, self._method, self._module, self._first = weakref.ref(owner), method, weakref.ref(module), first
        self._outside = _outside_of_graphs()

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Call the method.

        Args:
            module: The module whose hooks run.
            *args: The hook's arguments.
        """
        compiled = torch.compiler.is_compiling()
        if compiled and not (self._first or module.training):
            return  # a model in eval mode, of which nobody gathers: it may be one graph
        self._outside(self, compiled, module, args)

    def hand_on(self, compiled: bool, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Call the method of an owner that is still there.

        Args:
            compiled: Whether the hook was met in code that is compiled.
            module: The module whose hooks run.
            args: The hook's arguments.
        """
        owner = self._owner()
        if owner is None or module is not self._module():
            return
        token = _COMPILED.set(compiled)
        try:
            getattr(owner, self._method)(*self._first, *args)
        finally:
            _COMPILED.reset(token)

    def __deepcopy__(self, memo: Any) -> WeakHook:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert, ()


@cache
def _outside_of_graphs() -> Callable[[WeakHook, bool, nn.Module, tuple[Any, ...]], None]:
    reason = (
        "kronfac gathers statistics beside the model's forward, which no graph can hold. With fullgraph=True give the "
        "optimiser what torch.compile(model, fullgraph=True) returned, or compile the model's parts and not the whole."
    )
    outside: Callable[[WeakHook, bool, nn.Module, tuple[Any, ...]], None] = torch.compiler.disable(
        WeakHook.hand_on, reason=reason
    )
    return outside


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
