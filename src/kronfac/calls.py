"""Calls of layers in one forward pass: one of each layer, or several of those that are declared to be.

The calls of a declared layer (`kronfac.layers.called_repeatedly`) are put together as one: as positions that share its
weight, ``[B, S, d]``, as if the model had stacked the inputs along a second dimension, or, of a convolution, as further
examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from kronfac.broadcasts import meeting_of
from kronfac.layers import LayerAdapter

#: A layer's name and the number of its call.
Key = tuple[str, int]


class TapeError(RuntimeError):
    """The forward pass cannot be read; the text says which layer, why, and what to do."""


@dataclass
class Call:
    """One call of a layer.

    Attributes:
        adapter: The layer.
        input: What it was called with, detached.
        edge: Where its output entered the graph.
        output_shape: Shape of the output.
        version: The input's version at the call, to notice a later change in place.
        output: The output, detached, and its version, where a later change in place would cut the edge off.
        met: Whether it had no dimension of examples, and is looked at where the output is broadcast over them.
    """

    adapter: LayerAdapter
    input: Tensor
    edge: GradientEdge
    output_shape: torch.Size
    version: int
    output: tuple[Tensor, int] | None = None
    met: bool = False

    def meet(self, batch: int, users: Mapping[Node, list[Node]]) -> Call:
        """Look at the call where its output is broadcast over the examples, if it has none of its own.

        Args:
            batch: Number of examples.
            users: For each node of the graph those that use it.

        Returns:
            The call with the input of each example; itself where there is no such place.
        """
        if self.lacks(batch) and (found := meeting_of(self.edge.node, self.output_shape, batch, users)) is not None:
            edge, shape = found
            inner = self.input.shape[len(self.output_shape) + 1 - len(shape) :]
            return replace(self, input=self.input.expand(batch, *inner), edge=edge, output_shape=shape, met=True)
        return self

    def lacks(self, batch: int) -> bool:
        """Whether its first dimension is that of positions: a product or a norm of others than the examples.

        Args:
            batch: Number of examples.

        Returns:
            True if so.
        """
        return self.adapter.join == "positions" and not self.met and tuple(self.input.shape[:1]) != (batch,)

    def check(self) -> None:
        """Refuse an input that was changed in place after the call, and an output that must not be.

        Raises:
            TapeError: It was.
        """
        if self.input._version != self.version:
            raise TapeError(
                f"The input of layer {self.adapter.name!r} was changed in place after the layer used it, so its "
                "statistics would be wrong; make the operation that follows out of place (e.g. inplace=False)."
            )
        if self.output is not None and self.output[0]._version != self.output[1]:
            raise TapeError(
                f"The output of layer {self.adapter.name!r}, a view of a part of another tensor, was changed in place, "
                "which hides its derivative; make the operation that follows out of place (e.g. inplace=False)."
            )


class Calls:
    """The calls of a forward pass, in their order.

    Attributes:
        single: Each call by itself.
    """

    def __init__(self) -> None:
        self.single: dict[Key, Call] = {}
        self._keys: dict[str, list[Key]] = {}
        self._whole: dict[str, Call] = {}
        self._stale: set[str] = set()  # layers whose further calls are not joined yet

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def add(self, name: str, call: Call) -> None:
        """Take in a layer's call, the first or, of a layer that is declared to have several, a further one.

        Args:
            name: The layer.
            call: Its call.
        """
        keys = self._keys.setdefault(name, [])
        if keys:
            _check_shapes(name, self.single[keys[0]], call)
        key = (name, len(keys))
        keys.append(key)
        self.single[key] = call
        if self._whole.setdefault(name, call) is not call:
            self._stale.add(name)

    def meet(self, batch: int, users: Callable[[], Mapping[Node, list[Node]]]) -> None:
        """Look at calls that have no dimension of examples where their outputs are broadcast over these.

        Args:
            batch: Number of examples.
            users: Says for each node of the graph which ones use it.
        """
        lacking = [key for key, call in self.single.items() if call.lacks(batch)]
        graph = users() if lacking else {}
        taken = {call.edge.node for call in self.single.values()}
        for key in lacking:
            call = self.single[key].meet(batch, graph)
            if call.edge.node in taken:  # as before, or where another one is looked at
                continue
            taken.add(call.edge.node)
            self.single[key] = call
            if len(self._keys[key[0]]) == 1:
                self._whole[key[0]] = call
            else:
                self._stale.add(key[0])

    def by_layer(self) -> dict[str, Call]:
        """All calls of each layer as one.

        Returns:
            By name, in the order of the first calls.
        """
        while self._stale:
            name = self._stale.pop()
            self._whole[name] = self._join(self._keys[name])
        return self._whole

    def repeated(self, join: str | None = None) -> list[str]:
        """Layers that have several calls.

        Args:
            join: What the calls are put together as; anything by default.

        Returns:
            Their names.
        """
        names = (name for name, keys in self._keys.items() if len(keys) > 1)
        return [name for name in names if join in (None, self.single[name, 0].adapter.join)]

    def forget_input(self, name: str) -> None:
        """Let go of a layer's input.

        Args:
            name: The layer.
        """
        for call in (self.by_layer()[name], *(self.single[key] for key in self._keys[name])):
            call.input = call.input.new_empty(0)

    def collector(self, receive: Callable[[str, Tensor], None]) -> Collector:
        """What takes the cotangents of single calls, and hands them on layer by layer.

        Args:
            receive: Called with a layer's name and the cotangent of all its calls.

        Returns:
            The collector.
        """
        return Collector(self.single, self._keys, receive)

    def _join(self, keys: list[Key]) -> Call:
        calls = [self.single[key] for key in keys]
        adapter = calls[0].adapter
        for call in calls:
            adapter.require_batch(call.input)
        inputs = adapter.joined([call.input for call in calls], adapter.features[0])
        # Entries that take no memory.
        outputs = [torch.empty(call.output_shape, device="meta") for call in calls]
        shape = adapter.joined(outputs, adapter.features[1]).shape
        met = any(call.met for call in calls)
        return Call(adapter, inputs, calls[0].edge, shape, inputs._version, met=met)


def _check_shapes(name: str, first: Call, call: Call) -> None:
    """Refuse calls whose inputs cannot be put together."""
    one, other = tuple(first.input.shape), tuple(call.input.shape)
    if call.adapter.join == "positions" and one[0] != other[0]:
        raise TapeError(
            f"Layer {name!r} is declared to be called repeatedly, but its calls have batches of {one[0]} and "
            f"{other[0]}: they are taken for positions of the same examples. Call it once, on all rows together, "
            "where they are different ones."
        )
    if call.adapter.join == "examples" and one[1:] != other[1:]:
        raise TapeError(
            f"Layer {name!r} is called on inputs of shapes {one} and {other}; maps of several calls must be equally "
            "large."
        )


class Collector:
    """Hands a layer's cotangent on once that of its last call is there.

    Args:
        single: The calls.
        keys: Those of each layer.
        receive: Called with a layer's name and the cotangent of all its calls.
    """

    def __init__(
        self, single: dict[Key, Call], keys: dict[str, list[Key]], receive: Callable[[str, Tensor], None]
    ) -> None:
        self._single, self._keys, self._receive = single, keys, receive
        self._waiting: dict[str, dict[Key, Tensor]] = {}

    def take(self, key: Key, cotangent: Tensor) -> None:
        """Take what a call's output has.

        Args:
            key: The call.
            cotangent: Its cotangent, in the order of the output's entries.
        """
        name = key[0]
        cotangent = cotangent.detach().reshape(self._single[key].output_shape)
        if len(self._keys[name]) == 1:
            self._receive(name, cotangent)
            return
        waiting = self._waiting.setdefault(name, {})
        waiting[key] = cotangent
        if len(waiting) == len(self._keys[name]):
            self._hand_on(name)

    def finish(self) -> None:
        """Hand on what waited for calls that the outputs do not depend on, whose cotangents are zero."""
        for name in list(self._waiting):
            self._hand_on(name)

    def _hand_on(self, name: str) -> None:
        found = self._waiting.pop(name)
        like, adapter = next(iter(found.values())), self._single[name, 0].adapter
        parts = [
            found[key] if key in found else like.new_zeros(self._single[key].output_shape) for key in self._keys[name]
        ]
        self._receive(name, adapter.joined(parts, adapter.features[1]))
