"""Penalties of networks that change between tasks: larger layers, new ones, and ones that a task leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kronfac.blocks import Block, EigenKronecker
from kronfac.continual.base import Penalty, PenaltySum
from kronfac.continual.combine import Curvature, Part
from kronfac.continual.quadratic import QuadraticPenalty
from kronfac.curvature import BlockDiagonal
from kronfac.vectors import Layout


def on_old_entries(penalty: Penalty, live: Mapping[str, Tensor]) -> Tensor:
    """Evaluate on parameters that grew since: what was added to them is free.

    Args:
        penalty: A quadratic penalty, or a sum of such.
        live: The parameters; of one that has become larger, the leading entries are those of before.

    Returns:
        A 0-dim tensor.
    """
    values = []
    for term in penalty.terms if isinstance(penalty, PenaltySum) else (penalty,):
        shapes = term.parts[0][1].parameter_shapes if isinstance(term, QuadraticPenalty) else {}
        values.append(term({name: _leading(p, shapes.get(name, p.shape)) for name, p in live.items()}))
    return torch.stack([value.to(values[0].device) for value in values]).sum()


def on_all_layers(parts: tuple[Part, ...], new: Curvature, order: Sequence[str]) -> tuple[tuple[Part, ...], Curvature]:
    """Lay curvatures of before and a new one over the layers of both: zero where one of them has none.

    Args:
        parts: Weighted curvatures over the same parameters.
        new: A curvature whose layers may be others, or larger.
        order: The names of the model's parameters in their order.

    Returns:
        The curvatures of before and the new one, over the same parameters.

    Raises:
        NotImplementedError: If they differ and one of them couples layers, or a layer changed in another way.
    """  # noqa: DOC502
    old = parts[0][1]
    differing = sorted(old.blocks.keys() ^ new.blocks.keys())
    if not differing and old.parameter_shapes == new.parameter_shapes:
        return parts, new
    layouts = {**old.layouts, **new.layouts}
    nothing = {layer: (old if layer in old.blocks else new).blocks[layer].scale(0.0) for layer in differing}
    names = [*order, *old.parameter_names]

    def spread(curvature: Curvature) -> BlockDiagonal:
        if not isinstance(curvature, BlockDiagonal):
            raise NotImplementedError(
                f"a {type(curvature).__name__} cannot be added to curvature of other layers, or layers of other sizes"
            )
        blocks = {
            layer: _laid_out(layer, curvature, layout, new) if layer in curvature.blocks else nothing[layer]
            for layer, layout in layouts.items()
        }
        return BlockDiagonal(blocks, layouts, names, new.options)

    return tuple((weight, spread(part)) for weight, part in parts), spread(new)


def _leading(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The leading entries of a tensor that grew; the tensor itself where it did not."""
    if tensor.ndim != len(shape) or tensor.shape == shape:
        return tensor
    # What has become smaller stays as it is, for the penalty to refuse it by name.
    return tensor if any(n < m for n, m in zip(tensor.shape, shape, strict=True)) else tensor[_corner(shape)]


def _corner(shape: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(n) for n in shape)


def _laid_out(layer: str, curvature: Curvature, layout: Layout, new: Curvature) -> Block:
    """A layer's block over the parameters that the layer has now, with zeros for what was added."""
    block, own = curvature.blocks[layer], curvature.layouts[layer]
    before = {name: curvature.parameter_shapes[name] for name in own.parameter_names}
    there = before | new.parameter_shapes
    now = {name: there[name] for name in layout.parameter_names}
    if now == before:
        return block
    starts, total = {}, 0
    for name, shape in now.items():
        starts[name], total = total, total + shape.numel()
    numbers = {n: torch.arange(s.numel()).view(s).double() + starts[n] for n, s in now.items()}
    matrix = layout.pack(numbers).long()
    try:
        kept = own.pack({n: numbers[n][_corner(s)].reshape(s) for n, s in before.items()}).long()
    except (KeyError, RuntimeError):  # a parameter that is no longer trained, or has become smaller
        kept = None
    places = torch.empty(total, dtype=torch.long)
    places[matrix.flatten()] = torch.arange(total)
    if kept is not None and matrix.ndim == 2:
        at = places[kept]
        rows, columns = at[:, 0] // matrix.shape[1], at[0] % matrix.shape[1]
        if torch.equal(at, rows[:, None] * matrix.shape[1] + columns):
            return _placed(block, rows.to(block.device), columns.to(block.device), matrix.shape)
    shapes = {name: (tuple(before[name]), tuple(now[name])) for name in before if name in now}
    raise NotImplementedError(
        f"layer {layer!r} changed in a way that its curvature cannot follow: parameters {list(before)} before and "
        f"{list(now)} now, with shapes before and now {shapes}. Only linear layers, embeddings and convolutions "
        "without groups may become larger"
    )


def _placed(block: Block, rows: Tensor, columns: Tensor, shape: torch.Size) -> Block:
    """Put a block's entries at rows and columns of a larger matrix ``V``."""
    along = {
        "input": (columns, shape[1]),
        "second_input": (columns, shape[1]),
        "output": (rows, shape[0]),
        "second_output": (rows, shape[0]),
        "matrix": ((rows[:, None] * shape[1] + columns).flatten(), shape.numel()),
    }
    tensors = {}
    for name, tensor in block.tensors().items():
        if name == "values":
            tensors[name] = tensor.new_zeros(shape).index_put((rows[:, None], columns), tensor)
        elif name in along:
            index, size = along[name]
            empty = tensor.new_zeros((size,) * tensor.ndim)
            if isinstance(block, EigenKronecker):  # a basis: what was added has coordinates of its own, and no values
                empty.fill_diagonal_(1.0)
            tensors[name] = empty.index_put((index,) if tensor.ndim == 1 else (index[:, None], index), tensor)
        else:
            tensors[name] = tensor
    return type(block).from_tensors(tensors, shape)
