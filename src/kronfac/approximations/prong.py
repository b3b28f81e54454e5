"""Idealised PRONG as a curvature: whitened activations, white derivatives (Grosse & Martens 2016, Theorem 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from kronfac.approximations.base import Approximation, Mean, Statistic, require_finite, zeros
from kronfac.approximations.dense import DenseStatistic
from kronfac.approximations.sua import CHANNEL_MEANS, ChannelInput, reads_patches
from kronfac.blocks import Block, DiagonalKronecker, Kronecker
from kronfac.layers import LayerAdapter
from kronfac.layers.conv import ConvAdapter
from kronfac.linalg.symmetric import all_finite, mirror_
from kronfac.sources import Sample


class PRONGStatistic(Statistic):
    """The input factor of SUA or K-FAC, and the trace of ``(1/D) Σ g gᵀ``: the output factor is that over ``d_out``.

    Args:
        layer: The layer's adapter.
        boundaries: Whether a convolution's input factor sees where its taps read padding.
    """

    by_rows = CHANNEL_MEANS | {"input"}

    def __init__(self, layer: LayerAdapter, boundaries: bool = False) -> None:
        super().__init__(layer)
        self.boundaries = boundaries
        self.channels: ChannelInput | None = None
        self.rows: Mean | None = None
        if reads_patches(layer):
            assert isinstance(layer, ConvAdapter)
            self.channels = ChannelInput(layer)
        else:
            shape = (layer.d_in,) if layer.diagonal_input else (*layer.stack, layer.d_in, layer.d_in)
            self.rows = Mean(zeros(layer, *shape))
        self.trace = Mean(zeros(layer, *layer.stack, 1, 1))

    def means(self) -> dict[str, Mean]:
        """Those of the input, and the trace of the output factor."""
        input = {"input": self.rows} if self.rows is not None else {}
        return {**(self.channels.means() if self.channels else {}), **input, "trace": self.trace}

    def add(self, sample: Sample) -> None:
        """Add the moments of one pull."""
        require_finite(sample)
        layer = self.layer
        if sample.first:
            if self.channels is not None:
                self.channels.add(sample)
            elif self.rows is not None:
                count = layer.add_input_gram_(self.rows.total, sample.inputs, sample.row_weights, self.rows.alpha)
                self.rows.weight += float(count)
            self.trace.weight += sample.denominator
        if sample.cotangents is not None:
            squares = layer.output_rows(sample.cotangents).to(self.trace.total.dtype).square().sum((0, 1, -1))
            self.trace.total.add_(squares[..., None, None], alpha=sample.weight * self.trace.alpha)
        elif sample.output_moment is not None:
            traces = sample.output_moment.diagonal(dim1=-2, dim2=-1).sum(-1)
            self.trace.total.add_(traces[..., None, None], alpha=sample.weight * self.trace.alpha)
        elif sample.first:  # forward-only: the identity
            self.trace.total.add_(layer.d_out * sample.denominator * self.trace.alpha)

    def _input(self) -> Tensor:
        if self.channels is not None:
            return self.channels.factor(self.boundaries)
        assert self.rows is not None
        return self.rows.value() if self.layer.diagonal_input else mirror_(self.rows.value())

    def block(self) -> Block:
        """Return the block ``A ⊗ (tr G / d_out) I``."""
        layer, a, trace = self.layer, self._input(), self.trace.value()
        for what, factor in (("input", a), ("output", trace)):
            if not all_finite(factor):
                raise FloatingPointError(f"The {what} factor of layer {layer.name!r} overflowed to NaN or Inf.")
        g = trace / layer.d_out * torch.eye(layer.d_out).to(trace)
        return DiagonalKronecker(a, g) if layer.diagonal_input else Kronecker(a, g)


class PRONG(Approximation):
    """Spatially uncorrelated activations and white derivatives: whitening as PRONG does it, seen as curvature.

    Equation (129) of Grosse & Martens (2016), ``Ω̃ ⊗ I``: for a convolution, the channels' covariance at every tap and
    the outer product of their means; for a linear layer, K-FAC's input factor.  The theorem lets a learning rate absorb
    the scale of the derivatives, but there is one for each layer: here the identity of each layer (and group) is scaled
    by ``tr G / d_out``, so that blocks remain comparable with each other and with the damping.  With
    ``source="forward_only"``, ``G = I`` and this scale is 1, as in the theorem.  Normalisation layers keep the exact
    block of every unit.  Desjardins et al. 2015 is the method this idealises.

    Args:
        boundaries: Keep the β of equation (117), which PRONG drops: count where a tap reads padding.
    """

    name = "prong"
    needs_cotangents = False
    keeps_trace = False

    def __init__(self, boundaries: bool = False) -> None:
        self.boundaries = boundaries

    def start(self, layer: LayerAdapter) -> Statistic:
        """Return empty statistics.

        Args:
            layer: The layer's adapter.

        Returns:
            The statistic.
        """
        return DenseStatistic(layer) if layer.unit_wise else PRONGStatistic(layer, self.boundaries)
