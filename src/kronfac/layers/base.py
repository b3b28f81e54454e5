"""What every layer adapter knows: how a module's parameters form one matrix, and its input the rows that multiply it.

The one canonical format: a layer's trainable parameters are a matrix ``V = [W b]`` of shape ``[*stack, d_out, d_in]``
(``stack`` is ``(groups,)`` for grouped layers, ``(channels,)`` for normalisation layers, else empty), its input becomes
rows ``ā`` of shape ``[B, S, *stack, d_in]`` (``S`` positions share the weights) and the derivative with respect to its
output cotangents ``g`` of shape ``[B, S, *stack, d_out]``, such that the gradient is ``Σ_{b,s} g āᵀ``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kronfac.linalg.symmetric import add_gram_

#: What is set on a module that may be called several times.
REPEATS = "_kronfac_called_repeatedly"
#: What is set on a module that is to have no curvature.
LEFT_OUT = "_kronfac_without_curvature"


class UnsupportedLayer(Exception):
    """Raised by an adapter's constructor; its text says why the layer cannot be treated exactly."""


class LayerAdapter(ABC):
    """Translates one module into matrices.

    Args:
        module: The layer.
        name: Its name within the model; prefixes the parameters' names.
        sharing: ``"expand"`` or ``"reduce"`` (Eschenhagen et al. 2023): positions are rows of their own, or are
            averaged (inputs) and summed (cotangents) per example first.

    Attributes:
        stack: Leading shape of the parameter matrix.
        d_in: Width of a row, the bias's one included.
        d_out: Height of the parameter matrix.
        has_weight: Whether the weight is trained.
        has_bias: Whether the bias is trained.
        diagonal_input: The input factor is diagonal and kept as a vector ``[d_in]`` (embeddings).
        unit_wise: The block is kept densely per stack element (normalisation layers).
        channel_dim: The dimension of the layer's input and output that holds no positions: -1 or 1.
        autocast: The layer is a product, whose operands autocast rounds to 16 bits.
        join: What several calls are put together as: ``"positions"`` of the same examples, further ``"examples"``, or
            None where they cannot be.
        features: How many trailing dimensions of its input and of its output hold no positions.
    """

    stack: tuple[int, ...] = ()
    d_in: int
    d_out: int
    diagonal_input: bool = False
    unit_wise: bool = False
    channel_dim: int = -1
    autocast: bool = False
    join: str | None = None
    features: tuple[int, int] = (1, 1)

    def __init__(self, module: nn.Module, name: str, sharing: str = "expand") -> None:
        self.module = module
        self.name = name
        self.sharing = sharing
        # A parametrisation that changes nothing for now gives a parameter that is another module's.
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        self.has_weight = weight is not None and weight.requires_grad
        self.has_bias = bias is not None and bias.requires_grad
        self._prefix = f"{name}." if name else ""

    @property
    def repeats(self) -> bool:
        """Whether a forward may call the layer several times (`kronfac.layers.called_repeatedly`)."""
        return bool(getattr(self.module, REPEATS, False))

    def joined(self, tensors: Sequence[Tensor], features: int) -> Tensor:
        """Put the inputs, or the cotangents of the outputs, of several calls together.

        Args:
            tensors: One for each call.
            features: How many of their trailing dimensions hold no positions.

        Returns:
            ``[B, S, *features]`` with the positions of all calls, or all examples of all calls.
        """
        if self.join == "examples":
            return torch.cat(list(tensors))
        return torch.cat([t.reshape(len(t), -1, *t.shape[t.ndim - features :]) for t in tensors], dim=1)

    # ---------------------------------------------------------------- parameters
    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters by full name, weight first."""
        kept = [("weight", self.has_weight), ("bias", self.has_bias)]
        return {self._prefix + key: getattr(self.module, key) for key, has in kept if has}

    @property
    def spreads(self) -> bool:
        """Whether one NaN or Inf in the input makes NaN of the output for every example."""
        return False

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Full names of the trained parameters."""
        return (self.weight_key,) * self.has_weight + (self.bias_key,) * self.has_bias

    @property
    def shape(self) -> torch.Size:
        """Shape ``[*stack, d_out, d_in]`` of the parameter matrix."""
        return torch.Size((*self.stack, self.d_out, self.d_in))

    @property
    def weight_key(self) -> str:
        """Full name of the weight."""
        return self._prefix + "weight"

    @property
    def bias_key(self) -> str:
        """Full name of the bias."""
        return self._prefix + "bias"

    def matrix_view(self, weight: Tensor) -> Tensor | None:
        """View a tensor of the weight's shape as ``[*stack, d_out, columns]``, or None where no view exists."""
        return None

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Arrange tensors of the parameters' shapes as the matrix ``[*stack, d_out, d_in]``.

        Args:
            tensors: One tensor for each of :attr:`parameter_names`.

        Returns:
            The matrix; it shares memory with the weight where that is possible.
        """
        parts = []
        if self.has_weight:
            parts.append(self._weight_to_matrix(tensors[self.weight_key]))
        if self.has_bias:
            parts.append(tensors[self.bias_key].reshape(*self.stack, self.d_out, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def unpack(self, matrix: Tensor) -> dict[str, Tensor]:
        """Invert :meth:`pack`.

        Args:
            matrix: Shape ``[*stack, d_out, d_in]``.

        Returns:
            Tensors of the parameters' shapes, by full name.
        """
        out: dict[str, Tensor] = {}
        if self.has_weight:
            columns = matrix[..., : self.d_in - 1] if self.has_bias else matrix
            out[self.weight_key] = self._matrix_to_weight(columns)
        if self.has_bias:
            out[self.bias_key] = matrix[..., -1].reshape(self.parameters[self.bias_key].shape)
        return out

    def _weight_to_matrix(self, weight: Tensor) -> Tensor:
        view = self.matrix_view(weight)
        if view is None:
            raise NotImplementedError(f"{type(self).__name__} must define matrix_view or both weight conversions.")
        return view

    def _matrix_to_weight(self, columns: Tensor) -> Tensor:
        return columns.reshape(self.parameters[self.weight_key].shape)

    # ---------------------------------------------------------------- rows
    @abstractmethod
    def expand(self, x: Tensor) -> Tensor:
        """Return the rows ``ā`` of an input, shape ``[B, S, *stack, d_in]``, the bias's ones included."""

    @abstractmethod
    def expand_cotangents(self, g: Tensor) -> Tensor:
        """Return the cotangents as ``[B, S, *stack, d_out]``, aligned with :meth:`expand`."""

    def lacks_batch(self, x: Tensor) -> bool:
        """Whether an input is that of a single example, without a dimension of examples in front."""
        return False

    def require_batch(self, x: Tensor) -> None:
        """Refuse an input without a dimension of examples.

        Args:
            x: The layer's input.

        Raises:
            ValueError: It has none.
        """
        if self.lacks_batch(x):
            raise ValueError(
                f"Layer {self.name!r}: its input of shape {tuple(x.shape)} has no batch dimension; add one."
            )

    def positions(self, x: Tensor) -> tuple[int, ...]:
        """Shape ``(B, *positions)`` of the rows of an input before they are flattened to ``[B, S]``."""
        self.require_batch(x)
        return tuple(x.shape[:-1])

    def rows(self, x: Tensor) -> Tensor:
        """Rows of the input factor: ``[B, S, *stack, d_in]``, or ``[B, 1, …]`` means when weights are *reduced*."""
        rows = self.expand(x)
        return rows.mean(1, keepdim=True) if self.sharing == "reduce" else rows

    def output_rows(self, g: Tensor) -> Tensor:
        """Rows of the output factor: ``[B, S, *stack, d_out]``, or ``[B, 1, …]`` sums when weights are *reduced*."""
        rows = self.expand_cotangents(g)
        return rows.sum(1, keepdim=True) if self.sharing == "reduce" else rows

    # ---------------------------------------------------------------- second moments
    def add_input_gram_(
        self, total: Tensor, x: Tensor, weights: Tensor | None = None, alpha: float = 1.0
    ) -> float | Tensor:
        """Add ``alpha Σ_r w_r ā_r ā_rᵀ`` to the upper triangle of ``total`` ``[*stack, d_in, d_in]``.

        Args:
            total: Running sum, changed in place.
            x: The layer's input.
            weights: Weight of each row, shape ``[B, S]`` (``[B, 1]`` when reduced), or ``[B, S, *stack]`` where the
                elements of the stack differ; None means one.
            alpha: Factor of what is added.

        Returns:
            ``Σ_r w_r``.
        """
        rows = stack_first(self.rows(x), len(self.stack))
        add_gram_(total, rows, weights=None if weights is None else flat_weights(weights), alpha=alpha)
        return float(rows.shape[-2]) if weights is None else weights.sum()

    def add_output_gram_(self, total: Tensor, g: Tensor, scale: float = 1.0, weights: Tensor | None = None) -> None:
        """Add ``scale Σ_r w_r g_r g_rᵀ`` to the upper triangle of ``total`` ``[*stack, d_out, d_out]``.

        Args:
            total: Running sum, changed in place.
            g: Cotangent of the layer's output.
            scale: Factor of what is added.
            weights: Weight of each row, as for :meth:`add_input_gram_`.
        """
        rows = stack_first(self.output_rows(g), len(self.stack))
        add_gram_(total, rows, weights=None if weights is None else flat_weights(weights), alpha=scale)

    def input_norms(self, x: Tensor) -> Tensor:
        """Squared norms ``|ā|²`` of the rows of :meth:`rows`, shape ``[B, S, *stack]``."""
        return self.rows(x).square().sum(-1)

    def output_norms(self, g: Tensor) -> Tensor:
        """Squared norms ``|g|²`` of the rows of :meth:`output_rows`, shape ``[B, S, *stack]``."""
        return self.output_rows(g).square().sum(-1)

    def per_example_gradients(self, x: Tensor, g: Tensor) -> Tensor:
        """Gradient of each example's loss, shape ``[B, *stack, d_out, d_in]``; exact whatever ``sharing`` says."""
        a, g = self.expand(x), self.expand_cotangents(g)
        if a.shape[1] == 1:
            return g[:, 0].unsqueeze(-1) * a[:, 0].unsqueeze(-2)
        return torch.einsum("bs...o,bs...i->b...oi", g, a)

    def gradient_columns(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of the per-example gradients that are not zero, for layers with a diagonal input factor.

        Args:
            x: The layer's input.
            g: The cotangent of its output.

        Returns:
            Indices of the columns, ``[K]``, and the columns, ``[K, d_out]``; an index occurs once for each example.
        """
        raise NotImplementedError


def stack_first(rows: Tensor, stack_dims: int) -> Tensor:
    """Turn ``[B, S, *stack, d]`` into ``[*stack, B·S, d]``."""
    flat = rows.flatten(0, 1)
    return flat if stack_dims == 0 else flat.movedim(0, -2)


def flat_weights(weights: Tensor) -> Tensor:
    """Turn ``[B, S]`` into ``[B·S]`` and ``[B, S, *stack]`` into ``[*stack, B·S]``, as :func:`stack_first` has rows."""
    return weights.flatten(0, 1).movedim(0, -1)


def with_ones(rows: Tensor, has_weight: bool, has_bias: bool) -> Tensor:
    """Append the bias's column of ones, or return it alone when the weight is frozen."""
    if not has_bias:
        return rows
    ones = rows.new_ones(*rows.shape[:-1], 1)
    return torch.cat((rows, ones), dim=-1) if has_weight else ones


def require_float(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 at least."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
