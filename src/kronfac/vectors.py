"""Vectors over a model's parameters, and the matrices that blocks act on.

A vector is a mapping ``{parameter name: tensor}``. A layout turns the parameters of one layer into the matrix ``V`` of
that layer and back; `ParameterSpace` does so for all layers, after checking that the vector fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kronfac._typing import NamedTensors


class Layout(Protocol):
    """How the named parameters of one layer form its matrix ``V``; layer adapters are layouts."""

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Full names of the parameters."""
        ...

    def pack(self, tensors: Mapping[str, Tensor], /) -> Tensor:
        """Arrange tensors in the parameters' shapes as ``V``, shape ``[*stack, d_out, d_in]``."""
        ...

    def unpack(self, matrix: Tensor, /) -> dict[str, Tensor]:
        """Invert `pack`."""
        ...


class ParameterSpace:
    """The parameters that a set of layouts covers, and the way between vectors and matrices.

    Args:
        layouts: A layout for each layer, by the layer's name.
        matrix_shapes: The shape ``[*stack, d_out, d_in]`` of each layer's ``V``.
        order: Parameter names in the order that vectors have; those that no layout covers are ignored.

    Attributes:
        layouts: The layouts.
        matrix_shapes: The shape of each layer's ``V``.
        names: The parameters that the layouts cover, in order.
        shapes: Their shapes, in order.

    Raises:
        ValueError: If a layout contradicts its shape, two layers share a parameter, or the order lacks one.
    """

    def __init__(
        self, layouts: Mapping[str, Layout], matrix_shapes: Mapping[str, torch.Size], order: Sequence[str]
    ) -> None:
        self.layouts = dict(layouts)
        self.matrix_shapes = dict(matrix_shapes)
        shapes: dict[str, torch.Size] = {}
        owners: dict[str, str] = {}
        for layer, layout in self.layouts.items():
            try:
                parts = layout.unpack(torch.empty(matrix_shapes[layer], device="meta"))
            except RuntimeError as error:
                raise ValueError(
                    f"the block of layer {layer!r} has shape {tuple(matrix_shapes[layer])}, which does not fit its "
                    f"parameters {layout.parameter_names}"
                ) from error
            if set(parts) != set(layout.parameter_names):
                raise ValueError(f"layer {layer!r} names {layout.parameter_names} and unpacks {tuple(parts)}")
            if sum(part.numel() for part in parts.values()) != matrix_shapes[layer].numel():
                raise ValueError(
                    f"the block of layer {layer!r} has shape {tuple(matrix_shapes[layer])}, its parameters "
                    f"{ {name: tuple(part.shape) for name, part in parts.items()} }: the numbers of entries differ"
                )
            for name, part in parts.items():
                if name in owners:
                    raise ValueError(f"parameter {name!r} belongs to two blocks, {owners[name]!r} and {layer!r}")
                owners[name] = layer
                shapes[name] = part.shape
        known = set(order)
        missing = [name for name in shapes if name not in known]
        if missing:
            raise ValueError(f"parameter_order lacks {listed(missing)}")
        self.names = tuple(name for name in dict.fromkeys(order) if name in shapes)
        self.shapes = {name: shapes[name] for name in self.names}

    def pack(self, vector: NamedTensors) -> Iterator[tuple[str, Tensor]]:
        """Check a vector and give ``V`` layer by layer."""
        self.check(vector)
        for layer, layout in self.layouts.items():
            yield layer, layout.pack(vector)

    def unpack(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn one ``V`` per layer into a vector of contiguous tensors, in the order of the parameters."""
        parts: dict[str, Tensor] = {}
        for layer, layout in self.layouts.items():
            parts.update(layout.unpack(matrices[layer]))
        # Contiguous, because torch.nn.utils.parameters_to_vector refuses anything else.
        return {name: parts[name].contiguous() for name in self.names}

    def map(self, function: Callable[[str, Tensor], Tensor], vector: NamedTensors) -> dict[str, Tensor]:
        """Apply a function of layer and ``V`` to a vector."""
        return self.unpack({layer: function(layer, matrix) for layer, matrix in self.pack(vector)})

    def check(self, vector: NamedTensors) -> None:
        """Refuse a vector with missing, unknown or misshaped entries, and say which.

        Raises:
            TypeError: If the vector is no mapping.
            ValueError: If its entries do not fit the parameters.
        """
        if not isinstance(vector, Mapping):
            raise TypeError(f"a vector is a mapping {{parameter name: tensor}}, got {type(vector).__name__}")
        faults = []
        if missing := [name for name in self.names if name not in vector]:
            faults.append(f"it lacks {listed(missing)}")
        if extra := [name for name in vector if name not in self.shapes]:
            faults.append(f"there is no curvature for {listed(extra)}")
        faults += [
            f"{name!r} has shape {tuple(vector[name].shape)} instead of {tuple(shape)}"
            for name, shape in self.shapes.items()
            if name in vector and vector[name].shape != shape
        ]
        if faults:
            raise ValueError(f"the vector does not fit the curvature: {'; '.join(faults)}")

    def positions(self) -> dict[str, Tensor]:
        """Where each entry of each layer's row-major ``vec(V)`` stands in the vector of all parameters."""
        starts, total = {}, 0
        for name in self.names:
            starts[name] = total
            total += self.shapes[name].numel()
        positions = {}
        for layer, layout in self.layouts.items():
            size = self.matrix_shapes[layer].numel()
            position = torch.full((size,), -1)
            for name, part in layout.unpack(torch.arange(size).view(self.matrix_shapes[layer])).items():
                position[part.flatten()] = torch.arange(part.numel()) + starts[name]
            positions[layer] = position
        return positions


def listed(names: Sequence[str]) -> str:
    """Names for a message, the first ten of them."""
    shown = ", ".join(repr(name) for name in names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"


def require_real(names: Iterable[str]) -> None:
    """Refuse parameters that are complex numbers.

    Args:
        names: Their names.

    Raises:
        TypeError: There are some.
    """
    if found := list(names):
        raise TypeError(
            f"parameters {found} are complex numbers, and products are with real vectors: keep pairs of real numbers "
            "(torch.view_as_real) as the parameter, and make it complex in the forward (torch.view_as_complex); or "
            "leave it out, by parameters= or by freezing it (requires_grad=False)"
        )
