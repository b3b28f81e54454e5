"""Hooks that read layers: what they saw, and derivatives with respect to what they gave.

Forward hooks keep each layer's input and the *gradient edge* of its output; a pull differentiates the model's outputs
with respect to those edges.  No parameter gradient is computed and ``.grad`` is untouched.  The edge, not the output
tensor, is kept: an in-place activation after the layer replaces the tensor's history, so that differentiating the
tensor later is silently wrong.  Of an output that is a view (a linear layer's with positions) it is the edge of what it
views: a change in place leaves the view's own out of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from kronfac.calls import Call, Calls, Key, TapeError
from kronfac.eager import eagerly
from kronfac.graph import (
    feeders_of,
    in_backward,
    in_function,
    last_of,
    output_edge,
    unreached,
    used_elsewhere,
    users_of,
)
from kronfac.layers import LayerAdapter
from kronfac.measuring import apart_from_training, is_marked_apart


class Tape:
    """Calls recorded while open; pulls afterwards.

    Args:
        adapters: The layers to watch, by name.

    Attributes:
        constants: Layers that were called under `torch.no_grad`: what they gave then is a constant of the loss.
        disposable: Whether the forward serves nothing but the statistics, so that their last pull may give back what
            the graph and the calls hold, layer by layer.
    """

    def __init__(self, adapters: Mapping[str, LayerAdapter]) -> None:
        self.adapters = adapters
        self._calls = Calls()
        self.constants: set[str] = set()
        self._empty: set[Node] = set()  # of calls without rows
        self._handles: list[RemovableHandle] = []
        self._last: tuple[Tensor, list[Key]] | None = None
        self._apart = False  # whether it was opened for a measurement
        self.disposable = False

    @property
    def calls(self) -> dict[str, Call]:
        """The recorded call of each layer, by name; several calls of a layer are put together."""
        return self._calls.by_layer()

    def refuse_repeated(self, what: str, join: str | None = None) -> None:
        """Refuse layers with several calls.

        Args:
            what: What cannot take them, for the message.
            join: Refuse those alone whose calls are put together as this; all by default.

        Raises:
            TapeError: There are some.
        """
        if repeated := self._calls.repeated(join):
            raise TapeError(
                f"{what} does not take layers that a forward pass calls several times, here {repeated}: use "
                "approximation='kfac' with source='sampled' and sharing='expand', or one module for each call."
            )

    def meet(self, outputs: Tensor) -> None:
        """Look at calls without examples, of embeddings of positions, where what they gave is broadcast over these.

        Args:
            outputs: The model's outputs, attached to the graph; examples first.
        """
        if outputs.ndim:
            self._calls.meet(len(outputs), lambda: users_of(outputs, self._empty))
            self._last = None  # of where they were looked at before

    @property
    def empty(self) -> bool:
        """Whether layers were called without rows, and none with any."""
        return bool(self._empty) and not self._calls.single

    @property
    def is_open(self) -> bool:
        """Whether hooks are in place."""
        return bool(self._handles)

    def open(self) -> None:
        """Forget earlier calls and register the hooks."""
        self.close()
        self.forget()
        self._apart = is_marked_apart()
        for name, adapter in self.adapters.items():
            # First of the module's hooks: later ones may change the output, or belong to a root that is itself a layer.
            hook = self._hook(name, adapter)
            self._handles.append(adapter.module.register_forward_hook(hook, prepend=True, with_kwargs=True))

    def forget(self) -> None:
        """Let go of the calls, and of the graph that they are part of."""
        self._calls, self.constants, self._empty, self._last = Calls(), set(), set(), None

    def close(self) -> None:
        """Remove the hooks; calls stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, name: str, adapter: LayerAdapter) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
            if not self.is_open or is_marked_apart() != self._apart or in_backward():
                # Closed while this module's hooks run, as the collector may do with a forgotten optimiser's (they are
                # then called without keyword arguments); or someone measures in the middle of a training forward; or
                # this is a checkpoint's second one.
                return
            if not (torch.is_grad_enabled() or in_function()):
                self.constants.add(name)
                return
            kwargs, output = rest
            values = (*args, *kwargs.values())
            if values and isinstance(values[0], Tensor) and not values[0].numel():
                # An expert without tokens: as if it had not been called.
                if isinstance(output, Tensor) and output.requires_grad:
                    self._empty.add(output_edge(output)[0].node)
                return
            if name in self._calls and not adapter.repeats:
                raise TapeError(
                    f"Layer {name!r} is used more than once in a forward pass. Declare that it shares its weight "
                    "between calls, by kronfac.layers.called_repeatedly(layer); or use one module per call, or leave "
                    "the layer out, by kronfac.layers.without_curvature(layer) or by freezing it (requires_grad=False)."
                )
            if len(values) != 1 or not isinstance(values[0], Tensor):
                raise TapeError(f"Layer {name!r} must be called with one tensor, the input, to gather its curvature.")
            if not isinstance(output, Tensor):
                raise TapeError(f"Layer {name!r} returned a {type(output).__name__}; its curvature needs one tensor.")
            if not output.requires_grad:
                if not any(parameter.requires_grad for parameter in adapter.parameters.values()):
                    return  # frozen since the adapters were made
                raise TapeError(
                    f"The output of layer {name!r} carries no gradient: its forward ran in a torch.autograd.Function, "
                    "such as re-entrant checkpointing, or in a transform of torch.func inside the model (vmap, jvp). "
                    "Use torch.utils.checkpoint with use_reentrant=False, and batched operations in place of a vmap."
                )
            x = values[0].detach()
            if adapter.autocast and x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
                # What it multiplied, in half the memory, of which matrix units make moments at their full rate.
                x = x.to(torch.get_autocast_dtype(x.device.type))
            edge, certain = output_edge(output)
            kept = None if certain else (output.detach(), output._version)
            self._calls.add(name, Call(adapter, x, edge, output.shape, x._version, kept))

        return hook

    def forget_input(self, name: str) -> None:
        """Let go of a layer's input.

        Args:
            name: The layer.
        """
        self._calls.forget_input(name)

    def pull(self, outputs: Tensor, cotangent: Tensor, *, retain_graph: bool = True) -> dict[str, Tensor]:
        """Differentiate ``⟨outputs, cotangent⟩`` with respect to every recorded layer's output.

        Args:
            outputs: The model's outputs, attached to the graph.
            cotangent: Same shape; cast to the outputs' dtype.
            retain_graph: Keep the graph for further pulls and for the training loss.

        Returns:
            Cotangent of each layer's output, by layer name; zeros for layers that the outputs do not depend on.
        """
        pulled: dict[str, Tensor] = {}
        self.stream(outputs, cotangent, pulled.__setitem__, retain_graph=retain_graph)
        return {
            name: pulled[name] if name in pulled else outputs.new_zeros(call.output_shape)
            for name, call in self.calls.items()
        }

    def stream(
        self,
        outputs: Tensor,
        cotangent: Tensor,
        receive: Callable[[str, Tensor], None],
        *,
        retain_graph: bool = True,
    ) -> None:
        """Pull as :meth:`pull` does, but hand out each layer's cotangent as soon as it is complete, and keep none.

        Args:
            outputs: The model's outputs, attached to the graph.
            cotangent: Same shape; cast to the outputs' dtype.
            receive: Called with the layer's name and its cotangent, last layers first; not called for layers that the
                outputs do not depend on.
            retain_graph: Keep the graph for further pulls and for the training loss.

        Raises:
            TapeError: The outputs carry no gradient, or use a layer's parameters without calling the layer.
        """
        if not outputs.requires_grad:
            raise TapeError(
                "The model's outputs carry no gradient; do not detach them and run outside torch.no_grad()."
            )
        if not self.calls:
            return
        single = self._calls.single
        for call in single.values():
            call.check()
        last = self._last_edges(outputs)
        collector = self._calls.collector(receive)

        def hand_out(key: Key, gradient: Tensor | None) -> None:
            if gradient is not None:
                collector.take(key, gradient)

        def hook(key: Key, index: int) -> Callable[[tuple[Tensor | None, ...]], None]:
            return lambda gradients: hand_out(key, gradients[index])

        # Calls behind which no other recorded one lies end the pull; the others are met on the way.
        handles = [
            call.edge.node.register_prehook(hook(key, call.edge.output_nr))
            for key, call in single.items()
            if key not in last
        ]
        try:
            gradients = torch.autograd.grad(
                outputs,
                [single[key].edge for key in last],
                cotangent.to(outputs.dtype),
                retain_graph=retain_graph,
                allow_unused=True,
            )
        finally:
            for handle in handles:
                handle.remove()
        for key, gradient in zip(last, gradients, strict=True):
            hand_out(key, gradient)
        collector.finish()

    def _last_edges(self, outputs: Tensor) -> list[Key]:
        """Recorded calls from which no other recorded one can be reached, and those that are out of reach."""
        if self._last is None or self._last[0] is not outputs:
            self._refuse_other_uses(outputs)
            self._last = (outputs, last_of(outputs, self._nodes))
        return self._last[1]

    @property
    def _nodes(self) -> dict[Key, Node]:
        return {key: call.edge.node for key, call in self._calls.single.items()}

    def _refuse_other_uses(self, outputs: Tensor) -> None:
        nodes: dict[str, list[Node]] = {}
        for (name, _), node in self._nodes.items():
            nodes.setdefault(name, []).append(node)
        layers = {
            name: (nodes[name], [p for p in call.adapter.parameters.values() if p.requires_grad])
            for name, call in self.calls.items()
        }
        for name, adapter in self.adapters.items():
            if name not in layers:  # that it was not called says nothing of its parameters
                layers[name] = ([], [p for p in adapter.parameters.values() if p.requires_grad])
        used = used_elsewhere(outputs, layers, self._empty)
        if used:
            raise TapeError(
                f"The model's outputs depend on the parameters of layers {used} in another way than through their "
                "calls (such as F.linear(h, layer.weight), a state that an earlier forward left without detach(), "
                "derivatives of the network among its outputs, or code that was compiled before), which one block for "
                "each layer cannot hold. Where a "
                "second layer uses the same weight, make it a module whose weight is that parameter: tied weights are "
                "left out of the curvature, by name. Or leave the layers out yourself, by "
                "kronfac.layers.without_curvature(layer), or freeze them (requires_grad=False). What needs no "
                "blocks takes every use: kronfac.GaussNewtonOperator, kronfac.optim.HessianFree(precondition=False)."
            )

    def unreached(self, outputs: Tensor) -> set[str]:
        """Which recorded layers the outputs do not depend on.

        Args:
            outputs: The model's outputs, attached to the graph.

        Returns:
            Their names.
        """
        missed = unreached(outputs, self._nodes)
        return {name for name, _ in missed} - {name for name, _ in self._nodes.keys() - missed}

    def feeders(self, outputs: Tensor) -> dict[str | None, set[str]]:
        """From which recorded layers each one takes its input directly, not through another recorded layer.

        Args:
            outputs: The model's outputs, attached to the graph; their entry is ``None``, the last.

        Returns:
            Names by name, in the order of the calls.
        """
        return feeders_of(outputs, {name: call.edge.node for name, call in self.calls.items()})


@contextmanager
def record(adapters: Mapping[str, LayerAdapter]) -> Iterator[Tape]:
    """Record the layers' calls within the block; hooks are removed whatever happens.

    Args:
        adapters: The layers to watch, by name.

    Yields:
        The tape; pull from it inside the block or after it.
    """
    tape = Tape(adapters)
    with apart_from_training(), eagerly():
        tape.open()
        try:
            yield tape
        finally:
            tape.close()
