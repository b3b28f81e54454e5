"""Curvature with blocks between layers, as an operator on a model's parameters; vectors as in `kronfac.curvature`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kronfac._typing import NamedTensors
from kronfac.blocks import Block, CoupledBlocks, CoupledInverse, Tridiagonal
from kronfac.blocks.checks import check_gradients
from kronfac.damping import Rule, check_damping, get_rule
from kronfac.linalg.precision import without_autocast
from kronfac.vectors import Layout, ParameterSpace


class CoupledCurvature:
    """Curvature that couples layers: symmetric positive semi-definite, not block diagonal over them.

    It is the curvature of the loss as the likelihood's reduction defines it.

    Args:
        coupled: The matrix over the layers.
        layouts: How the parameters of each layer form the matrix that the blocks act on.
        parameter_order: Parameter names in the order of ``model.parameters()``; those without a block are ignored.
        options: What the layouts were built with (``"sharing"``, ``"norm"``).

    Attributes:
        coupled: The matrix over the layers.
        blocks: Its diagonal blocks, ``{layer name: Block}``; they are not the whole matrix.
        layouts: ``{layer name: Layout}``.
        parameter_names: The parameters that have curvature, in the order of ``model.parameters()``.
        parameter_shapes: Their shapes.
        options: What the layouts were built with.
    """

    def __init__(
        self,
        coupled: CoupledBlocks,
        layouts: Mapping[str, Layout],
        parameter_order: Sequence[str],
        options: Mapping[str, str] | None = None,
    ) -> None:
        self.coupled = coupled
        self.blocks: dict[str, Block] = dict(coupled.blocks)
        self.layouts: dict[str, Layout] = {layer: layouts[layer] for layer in self.blocks}
        self.options: dict[str, str] = dict(options or {})
        self._parameters = ParameterSpace(
            self.layouts, {layer: block.shape for layer, block in self.blocks.items()}, parameter_order
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
        return self._parameters.unpack(self.coupled.matmul(dict(self._parameters.pack(vector))))

    @without_autocast
    def quadratic_form(self, vector: NamedTensors) -> Tensor:
        """Quadratic form ``v^T C v``; differentiable in the vector.

        Args:
            vector: ``{parameter name: tensor}``, exactly one for each of `parameter_names`.

        Returns:
            A 0-dim tensor.
        """
        packed = dict(self._parameters.pack(vector))
        product = self.coupled.matmul(packed)
        return torch.stack([(product[layer] * packed[layer]).sum() for layer in packed]).sum()

    @without_autocast
    def trace(self) -> Tensor:
        """Trace, that of the diagonal blocks.

        Returns:
            A 0-dim tensor.
        """
        return torch.stack([block.trace() for block in self.blocks.values()]).sum()

    @without_autocast
    def diagonal(self) -> dict[str, Tensor]:
        """Diagonal, that of the diagonal blocks.

        Returns:
            ``{parameter name: tensor}`` in the parameters' shapes; a copy.
        """
        return self._parameters.unpack({layer: block.diagonal().clone() for layer, block in self.blocks.items()})

    @without_autocast
    def frobenius_norm(self) -> Tensor:
        """Frobenius norm, blocks between layers included.

        Returns:
            A 0-dim tensor.
        """
        return self.coupled.frobenius_norm()

    @without_autocast
    def to_dense(self) -> Tensor:
        """Dense matrix, in the order of `torch.nn.utils.parameters_to_vector` over `parameter_names`.

        Returns:
            Shape ``[P, P]``.
        """
        return _dense(self._parameters, self.coupled.matmul, self.coupled.dtype, self.coupled.device)

    def scale(self, factor: Tensor | float) -> CoupledCurvature:
        """Multiply by a number.

        Args:
            factor: Not negative.

        Returns:
            A new curvature.
        """
        return type(self)(self.coupled.scale(factor), self.layouts, self.parameter_names, self.options)

    @without_autocast
    def factorise(self, damping: float, rule: str | Rule = "factored") -> CoupledCurvatureInverse:
        """Prepare to solve with the damped curvature.

        Args:
            damping: Not negative. It enters the diagonal blocks alone, as the rule says.
            rule: ``"factored"``, or a function ``(block, damping) -> Shift`` whose shifts the blocks support.

        Returns:
            The inverse.

        Raises:
            torch.linalg.LinAlgError: If the damped matrix cannot be inverted; the message names the layer.
            TypeError: If the damping, or a number that the curvature was scaled by, requires a gradient, which would
                be lost.
        """  # noqa: DOC502
        damping, decide = check_damping(damping), get_rule(rule)
        shifts = {layer: decide(block, damping) for layer, block in self.blocks.items()}
        try:
            inverse = self.coupled.factorise(shifts)
        except torch.linalg.LinAlgError as error:
            raise torch.linalg.LinAlgError(f"with damping {damping:.3g}: {error}") from error
        for layer, block in self.blocks.items():  # no inverse here has all of their gradients
            check_gradients(f"the block of layer {layer!r}", block, None)
        return CoupledCurvatureInverse(inverse, self._parameters, self.coupled)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.blocks)} layers, {len(self.parameter_names)} parameters)"


class BlockTridiagonal(CoupledCurvature):
    """K-FAC's block-tridiagonal approximation (Martens & Grosse 2015, section 4.3): its *inverse* is block tridiagonal.

    The diagonal blocks are those of K-FAC, and the blocks between neighbouring layers are the Kronecker products
    ``E[g_i g_{i+1}^T] x E[a_i a_{i+1}^T]``; those further away are what a Markov chain over the layers makes of these.

    ``factorise(damping)`` takes ``rule="factored"``: ``π√λ`` and ``√λ/π`` on the two factors of every layer before
    anything else, and the moments between layers as they are. The matrix itself (`matmul`, `to_dense`, ...) is not
    damped and needs no inverse: singular factors are regressed upon by their pseudo-inverse.
    """


def coupled_curvature(
    coupled: CoupledBlocks, layouts: Mapping[str, Layout], parameter_order: Sequence[str], options: Mapping[str, str]
) -> CoupledCurvature:
    """Make the operator that goes with a matrix over the layers.

    Args:
        coupled: The matrix.
        layouts: As for `CoupledCurvature`.
        parameter_order: As for `CoupledCurvature`.
        options: As for `CoupledCurvature`.

    Returns:
        The operator.
    """
    kind = BlockTridiagonal if isinstance(coupled, Tridiagonal) else CoupledCurvature
    return kind(coupled, layouts, parameter_order, options)


class CoupledCurvatureInverse:
    """The inverse of a damped curvature; made by `CoupledCurvature.factorise`.

    Attributes:
        inverse: The inverse over the layers.
        parameter_names: The parameters it acts on.
    """

    def __init__(self, inverse: CoupledInverse, parameters: ParameterSpace, coupled: CoupledBlocks) -> None:
        self.inverse = inverse
        self.parameter_names = parameters.names
        self._parameters = parameters
        self._dtype, self._device = coupled.dtype, coupled.device

    @without_autocast
    def apply(self, vector: NamedTensors) -> dict[str, Tensor]:
        """Solve with the damped curvature.

        Args:
            vector: ``{parameter name: tensor}``, exactly one for each of `parameter_names`.

        Returns:
            The inverse times the vector, by parameter name.
        """
        return self._parameters.unpack(self.inverse.apply(dict(self._parameters.pack(vector))))

    @without_autocast
    def sqrt_apply(self, vector: NamedTensors) -> dict[str, Tensor]:
        """Multiply by a root ``S`` of the inverse, ``S S^T = inverse``: white noise gets the inverse as its covariance.

        Args:
            vector: ``{parameter name: tensor}``, exactly one for each of `parameter_names`.

        Returns:
            ``S v`` by parameter name.
        """
        return self._parameters.unpack(self.inverse.sqrt_apply(dict(self._parameters.pack(vector))))

    @without_autocast
    def logdet(self) -> Tensor:
        """Log-determinant of the damped curvature (not of its inverse).

        Returns:
            A 0-dim tensor.
        """
        return self.inverse.logdet()

    @without_autocast
    def to_dense(self) -> Tensor:
        """Dense inverse, in the order of `torch.nn.utils.parameters_to_vector` over `parameter_names`.

        Returns:
            Shape ``[P, P]``.
        """
        return _dense(self._parameters, self.inverse.apply, self._dtype, self._device)


def _dense(
    parameters: ParameterSpace,
    product: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Matrix of a product, from a batch of all unit vectors."""
    size = sum(shape.numel() for shape in parameters.shapes.values())
    units = torch.eye(size, dtype=dtype, device=device)
    places = {layer: position.to(device) for layer, position in parameters.positions().items()}
    shapes = parameters.matrix_shapes
    columns = product({layer: units[:, place].reshape(size, *shapes[layer]) for layer, place in places.items()})
    dense = torch.empty_like(units)
    for layer, place in places.items():
        dense[:, place] = columns[layer].reshape(size, -1)
    return dense.mT
