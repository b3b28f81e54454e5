"""``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``: every stride, padding mode, dilation; one factor pair per group."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kronfac.layers.base import LayerAdapter, flat_weights, require_float, with_ones
from kronfac.layers.conv_moments import add_conv_gram_
from kronfac.layers.conv_weighted import add_weighted_conv_gram_, row_norms
from kronfac.layers.geometry import Geometry, im2col, reads
from kronfac.layers.registry import adapt
from kronfac.linalg.symmetric import add_product_, summed_in_float32

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class ConvAdapter(LayerAdapter):
    """Convolution as a product of ``W̄`` with patches (Grosse & Martens 2016, section 2.1 and Theorem 1)."""

    channel_dim = 1
    autocast = True
    join = "examples"  # maps beside each other would be neighbours

    def __init__(self, module: Convolution, name: str, sharing: str = "expand") -> None:
        super().__init__(module, name, sharing)
        self.geometry = Geometry.of(module)
        self._dims = len(self.geometry.kernel)
        groups = module.groups
        self.stack = (groups,) if groups > 1 else ()
        self._columns = module.in_channels // groups * math.prod(module.kernel_size)
        self.d_in = self._columns * self.has_weight + self.has_bias
        self.d_out = module.out_channels // groups

    def matrix_view(self, weight: Tensor) -> Tensor:
        """Return the weight with its columns flattened."""
        return weight.reshape(*self.stack, self.d_out, self._columns)

    def _image(self, x: Tensor) -> Tensor:
        return self._batched(require_float(x))

    def _operand(self, x: Tensor) -> Tensor:
        # Plain products of ungrouped maps alone take what has 16 bits.
        return self._batched(x) if summed_in_float32(x) and not self.stack else self._image(x)

    def lacks_batch(self, x: Tensor) -> bool:
        """True of a single image."""
        return x.ndim != self._dims + 2

    def _batched(self, x: Tensor) -> Tensor:
        self.require_batch(x)
        return x.contiguous()

    def positions(self, x: Tensor) -> tuple[int, ...]:
        """Batch and output positions."""
        self.require_batch(x)
        return (x.shape[0], *self.geometry.output_size(tuple(x.shape[2:])))

    def reads(self, size: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Which input position each tap reads, for an input of spatial size ``size``: see `geometry.reads`."""
        return reads(self.geometry, size)

    def expand(self, x: Tensor) -> Tensor:
        """Return patches ``[B, T, *stack, d_in]``."""
        rows = im2col(self._image(x), self.geometry)
        return with_ones(rows if self.stack else rows.squeeze(2), self.has_weight, self.has_bias)

    def expand_cotangents(self, g: Tensor) -> Tensor:
        """Return ``[B, T, *stack, d_out]``."""
        g = self._image(g)
        return g.reshape(g.shape[0], *self.stack, self.d_out, -1).movedim(-1, 1)

    def add_input_gram_(
        self, total: Tensor, x: Tensor, weights: Tensor | None = None, alpha: float = 1.0
    ) -> float | Tensor:
        """Add the patches' second moment by the cheapest exact form."""
        if self.sharing == "reduce" or not self.has_weight:
            return super().add_input_gram_(total, x, weights, alpha)
        stacked, x = (
            total if self.stack else total.unsqueeze(0),
            self._operand(x) if weights is None else self._image(x),
        )
        if weights is not None:
            return add_weighted_conv_gram_(stacked, x, self.geometry, weights, ones=self.has_bias, alpha=alpha)
        return add_conv_gram_(stacked, x, self.geometry, ones=self.has_bias, alpha=alpha)

    def add_output_gram_(self, total: Tensor, g: Tensor, scale: float = 1.0, weights: Tensor | None = None) -> None:
        """Add the cotangents' second moment."""
        if self.sharing == "reduce":
            super().add_output_gram_(total, g, scale, weights)
            return
        g = self._operand(g) if weights is None else self._image(g)
        columns = g.reshape(g.shape[0], *self.stack, self.d_out, -1)
        if weights is None and columns.shape[-1] >= self.d_out and total.device.type == "cpu":
            # One small product for each example, where it lies.
            columns = columns.flatten(0, -3)
            products = torch.bmm(columns, columns.mT).view(g.shape[0], *total.shape)
            total.add_(products.sum(0), alpha=scale)
            return
        # Channels first: one transposed copy, no interleaving.
        columns = columns.movedim(0, -2).flatten(-2)
        left = columns if weights is None else columns * flat_weights(weights.to(g.dtype)).unsqueeze(-2)
        add_product_(total, left.mT, columns.mT, alpha=scale, symmetric=not self.stack)

    def input_norms(self, x: Tensor) -> Tensor:
        """Return ``|ā|²`` as ``[B, T, *stack]``, without patches."""
        if self.sharing == "reduce" or not self.has_weight:
            return super().input_norms(x)
        norms = row_norms(self._image(x), self.geometry)
        norms = norms + 1.0 if self.has_bias else norms
        return norms if self.stack else norms.squeeze(-1)

    def output_norms(self, g: Tensor) -> Tensor:
        """Return ``|g|²`` as ``[B, T, *stack]``, summed where the channels lie."""
        if self.sharing == "reduce":
            return super().output_norms(g)
        g = self._image(g)
        return g.reshape(g.shape[0], *self.stack, self.d_out, -1).square().sum(-2).movedim(-1, 1)


@adapt.register(nn.Conv1d)
@adapt.register(nn.Conv2d)
@adapt.register(nn.Conv3d)
def _(module: Convolution, name: str, sharing: str = "expand") -> LayerAdapter:
    return ConvAdapter(module, name, sharing)
