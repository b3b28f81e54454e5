"""Curvature as an operator on a model's parameters.

A vector is a mapping ``{parameter name: tensor}``, one tensor for each of ``curvature.parameter_names`` in the
parameter's shape. The order of rows and columns of ``to_dense()`` is that of `torch.nn.utils.parameters_to_vector` over
the same names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from kronfac._typing import NamedTensors
from kronfac.blocks import Block, Inverse
from kronfac.blocks.checks import check_gradients
from kronfac.damping import Rule, check_damping, get_rule
from kronfac.linalg.precision import without_autocast
from kronfac.vectors import Layout, ParameterSpace, listed


class BlockDiagonal:
    """Block-diagonal curvature: one block for each layer, zero between layers.

    It is the curvature of the loss as the likelihood's reduction defines it. Symmetric positive semi-definite.

    Args:
        blocks: A block for each layer, by the layer's name.
        layouts: How the parameters of each of these layers form the matrix that its block acts on.
        parameter_order: Parameter names in the order of ``model.parameters()``; those without a block are ignored.
        options: What the layouts were built with (``"sharing"``, ``"norm"``), kept for `kronfac.save`.

    Attributes:
        blocks: ``{layer name: Block}``.
        layouts: ``{layer name: Layout}``.
        parameter_names: The parameters that have curvature, in the order of ``model.parameters()``.
        parameter_shapes: Their shapes.
        options: What the layouts were built with.

    Raises:
        ValueError: If layers or parameters do not fit together.
        TypeError: If a block is none, or blocks differ in dtype.
    """

    def __init__(
        self,
        blocks: Mapping[str, Block],
        layouts: Mapping[str, Layout],
        parameter_order: Sequence[str],
        options: Mapping[str, str] | None = None,
    ) -> None:
        if not blocks:
            raise ValueError("a curvature needs at least one block: no layer of the model has one")
        for layer, block in blocks.items():
            if not isinstance(block, Block):
                raise TypeError(f"the block of layer {layer!r} must be a Block, got {type(block).__name__}")
        if without := [layer for layer in blocks if layer not in layouts]:
            raise ValueError(f"there is a block but no layout for the layers {listed(without)}")
        if len(dtypes := {block.dtype: layer for layer, block in blocks.items()}) > 1:
            each = " and ".join(f"{dtype} (layer {layer!r})" for dtype, layer in dtypes.items())
            raise TypeError(f"blocks must share one dtype, got {each}; cast the model to one of them")
        self.blocks: dict[str, Block] = dict(blocks)
        self.layouts: dict[str, Layout] = {layer: layouts[layer] for layer in blocks}
        self.options: dict[str, str] = dict(options or {})
        self._parameters = ParameterSpace(
            self.layouts, {layer: block.shape for layer, block in blocks.items()}, parameter_order
        )
        self.parameter_names = self._parameters.names
        self.parameter_shapes = self._parameters.shapes

    @without_autocast
    def matmul(self, vector: NamedTensors) -> dict[str, Tensor]:
        """Multiply by a vector.

        Args:
            vector: ``{parameter name: tensor}``, exactly one for each of `parameter_names`.

        Returns:
            ``C v`` by parameter name.
        """
        return self._parameters.map(lambda layer, matrix: self.blocks[layer].matmul(matrix), vector)

    @without_autocast
    def quadratic_form(self, vector: NamedTensors) -> Tensor:
        """Quadratic form ``v^T C v``; differentiable in the vector.

        Args:
            vector: ``{parameter name: tensor}``, exactly one for each of `parameter_names`.

        Returns:
            A 0-dim tensor.
        """
        return _sum(self.blocks[layer].quadratic_form(matrix) for layer, matrix in self._parameters.pack(vector))

    @without_autocast
    def inner(self, other: BlockDiagonal) -> Tensor:
        """Frobenius inner product ``tr(C^T D)`` with another curvature of the same layers.

        Args:
            other: A curvature with blocks of the same shapes for the same layers.

        Returns:
            A 0-dim tensor.

        Raises:
            ValueError: If the layers or their parameters differ.
        """
        if differing := sorted(self.blocks.keys() ^ other.blocks.keys()):
            raise ValueError(f"only one of the two curvatures has a block for {listed(differing)}")
        if self.parameter_shapes != other.parameter_shapes:
            raise ValueError("the two curvatures are over different parameters")
        return _sum(block.inner(other.blocks[layer]) for layer, block in self.blocks.items())

    @without_autocast
    def trace(self) -> Tensor:
        """Trace.

        Returns:
            A 0-dim tensor.
        """
        return _sum(block.trace() for block in self.blocks.values())

    @without_autocast
    def frobenius_norm(self) -> Tensor:
        """Frobenius norm.

        Returns:
            A 0-dim tensor.
        """
        return _sum(block.frobenius_norm().square() for block in self.blocks.values()).sqrt()

    @without_autocast
    def diagonal(self) -> dict[str, Tensor]:
        """Diagonal.

        Returns:
            ``{parameter name: tensor}`` in the parameters' shapes; a copy.
        """
        return self._parameters.unpack({layer: block.diagonal().clone() for layer, block in self.blocks.items()})

    @without_autocast
    def to_dense(self) -> Tensor:
        """Dense matrix, in the order of `torch.nn.utils.parameters_to_vector` over `parameter_names`.

        Returns:
            Shape ``[P, P]``.
        """
        first = next(iter(self.blocks.values()))
        size = sum(shape.numel() for shape in self.parameter_shapes.values())
        dense = torch.zeros(size, size, dtype=first.dtype, device=first.device)
        for layer, position in self._parameters.positions().items():
            position = position.to(dense.device)
            dense[position.unsqueeze(1), position] = self.blocks[layer].to_dense().to(dense.device)
        return dense

    def scale(self, factor: Tensor | float) -> BlockDiagonal:
        """Multiply by a number.

        Args:
            factor: Not negative.

        Returns:
            A new curvature.
        """
        scaled = {layer: block.scale(factor) for layer, block in self.blocks.items()}
        return BlockDiagonal(scaled, self.layouts, self.parameter_names, self.options)

    @without_autocast
    def factorise(self, damping: float, rule: str | Rule = "factored") -> CurvatureInverse:
        """Prepare to solve with the damped curvature.

        Args:
            damping: Not negative; how it enters each block is the rule's business.
            rule: ``"factored"``, ``"exact"``, ``"normal"``, ``"trace_restricted"``, or a function ``(block, damping) ->
                Shift``.

        Returns:
            The inverse.

        Raises:
            torch.linalg.LinAlgError: If a block cannot be inverted; the message names the layer.
            TypeError: If the damping, or a number that the curvature was scaled by, requires a gradient, which would
                be lost.
        """  # noqa: DOC502
        damping = check_damping(damping)
        decide = get_rule(rule)
        inverses: dict[str, Inverse] = {}
        for layer, block in self.blocks.items():
            try:
                inverses[layer] = block.factorise(decide(block, damping))
            except torch.linalg.LinAlgError as error:
                raise torch.linalg.LinAlgError(f"layer {layer!r} with damping {damping:.3g}: {error}") from error
            check_gradients(f"the block of layer {layer!r}", block, inverses[layer])
        return CurvatureInverse(inverses, self._parameters)

    def __repr__(self) -> str:
        kinds = ", ".join(sorted({type(block).__name__ for block in self.blocks.values()}))
        return f"BlockDiagonal({len(self.blocks)} layers, {len(self.parameter_names)} parameters; {kinds})"


#: What `kronfac.estimate` gives, by its short name.
Curvature = BlockDiagonal


class CurvatureInverse:
    """The inverse of a damped curvature; made by `BlockDiagonal.factorise`.

    Attributes:
        inverses: ``{layer name: Inverse}``.
        parameter_names: The parameters it acts on.
    """

    def __init__(self, inverses: Mapping[str, Inverse], parameters: ParameterSpace) -> None:
        self.inverses: dict[str, Inverse] = dict(inverses)
        self.parameter_names = parameters.names
        self._parameters = parameters

    @without_autocast
    def apply(self, vector: NamedTensors) -> dict[str, Tensor]:
        """Solve with the damped curvature.

        Args:
            vector: ``{parameter name: tensor}``, exactly one for each of `parameter_names`.

        Returns:
            The inverse times the vector, by parameter name.
        """
        return self._parameters.map(lambda layer, matrix: self.inverses[layer].apply(matrix), vector)

    @without_autocast
    def sqrt_apply(self, vector: NamedTensors) -> dict[str, Tensor]:
        """Multiply by a root ``S`` of the inverse, ``S S^T = inverse``: white noise gets the inverse as its covariance.

        Args:
            vector: ``{parameter name: tensor}``, exactly one for each of `parameter_names`.

        Returns:
            ``S v`` by parameter name. Which root it is, each block's inverse says.
        """
        return self._parameters.map(lambda layer, matrix: self.inverses[layer].sqrt_apply(matrix), vector)

    @without_autocast
    def logdet(self) -> Tensor:
        """Log-determinant of the damped curvature (not of its inverse).

        Returns:
            A 0-dim tensor.
        """
        return _sum(inverse.logdet() for inverse in self.inverses.values())


def _sum(terms: Iterator[Tensor]) -> Tensor:
    """Sum of 0-dim tensors, on the device of the first."""
    first = next(terms)
    return torch.stack([first, *(term.to(first.device) for term in terms)]).sum()
