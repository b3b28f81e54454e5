"""KFC with spatially uncorrelated activations: a convolution's input factor from the moments of its channels alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kronfac.approximations.base import Approximation, Mean, Statistic, require_finite, zeros
from kronfac.approximations.dense import DenseStatistic
from kronfac.approximations.kfac import KFACStatistic
from kronfac.blocks import Block, Kronecker
from kronfac.layers import LayerAdapter
from kronfac.layers.base import require_float
from kronfac.layers.conv import ConvAdapter
from kronfac.linalg.symmetric import add_gram_, all_finite, mirror_
from kronfac.sources import Sample


def tap_counts(tables: Sequence[Tensor]) -> tuple[Tensor, Tensor, int]:
    """Count output positions by what pairs of taps read there.

    Args:
        tables: For each spatial dimension, the input position that each tap reads at each output position, -1 for
            none: what `ConvAdapter.reads` gives.

    Returns:
        The positions at which both taps read one and the same input, and those at which both read inputs, ``[taps,
        taps]`` each in float64; and the number of all positions.
    """
    same = both = torch.ones(1, 1, dtype=torch.float64)
    positions = 1
    for table in tables:
        inside = table >= 0
        equal = (table[:, :, None] == table[:, None, :]) & inside[:, :, None]
        both = torch.kron(both, inside.T.double() @ inside.double())
        same = torch.kron(same, equal.sum(0).double())
        positions *= len(table)
    return same, both, positions


#: Names of the means of :class:`ChannelInput`.
CHANNEL_MEANS = frozenset({"second", "first", "same", "both"})


class ChannelInput:
    """Input factor of a convolution under SH and SUA (Grosse & Martens 2016, section 4.2), without patches.

    With the channels' mean ``M`` and covariance ``Σ`` over examples and locations, two activations have the second
    moment ``M(j)M(j')``, plus ``Σ(j, j')`` where they lie at the same location.  Averaged over the output positions,

        ``A(jδ, j'δ') = [same(δ, δ') Σ(j, j') + both(δ, δ') M(j) M(j')] / |T|``
        ``A(jδ, bias) = both(δ, δ) M(j) / |T|``,   ``A(bias, bias) = 1``

    where ``both`` counts the positions at which taps δ and δ' read inputs (the β of equation (24), for any stride,
    dilation and padding), and ``same`` those at which they read one and the same input: zero off the diagonal, unless
    the padding repeats inputs (reflect, replicate, circular).  Positive semi-definite by construction.

    Args:
        layer: The convolution's adapter; its weight is trained.

    Raises:
        ValueError: The layer shares weights by *reduce*, to which the assumption does not speak.
    """

    def __init__(self, layer: ConvAdapter) -> None:
        if layer.sharing != "expand":
            raise ValueError(
                f"spatially uncorrelated activations need sharing='expand', got sharing={layer.sharing!r} for the "
                f"convolution {layer.name!r}; use approximation='kfac' with it."
            )
        self.layer = layer
        self.taps = math.prod(layer.geometry.kernel)
        self.channels = (layer.d_in - layer.has_bias) // self.taps
        self.second = Mean(zeros(layer, *layer.stack, self.channels, self.channels))
        self.first = Mean(zeros(layer, *layer.stack, self.channels))
        self.same = Mean(zeros(layer, self.taps, self.taps))
        self.both = Mean(zeros(layer, self.taps, self.taps))
        self._counts: dict[tuple[int, ...], tuple[Tensor, Tensor, int]] = {}

    def means(self) -> dict[str, Mean]:
        """Channels' second and first moments, and the shares of positions by what pairs of taps read."""
        return {"second": self.second, "first": self.first, "same": self.same, "both": self.both}

    def add(self, sample: Sample) -> None:
        """Add the inputs of a forward pass.

        Args:
            sample: Its first sample. Weights that differ between positions of one example are refused.
        """
        layer, x = self.layer, require_float(sample.inputs)
        size = tuple(x.shape[2:])
        weights, examples = self._example_weights(sample.row_weights), float(len(x))
        if weights is not None:
            examples = float(weights.sum())
            weights = weights.to(x.dtype).repeat_interleave(math.prod(size))
        # Channels first: [*stack, channels, examples · locations].
        columns = x.flatten(2).transpose(0, 1).reshape(*layer.stack, self.channels, -1).to(self.second.total.dtype)
        weighted = columns if weights is None else columns * weights
        if layer.stack:
            self.second.total.add_(weighted @ columns.mT, alpha=self.second.alpha)
        else:
            add_gram_(self.second.total, columns.mT, weights=weights, alpha=self.second.alpha)
        self.first.total.add_(weighted.sum(-1), alpha=self.first.alpha)
        if size not in self._counts:
            self._counts = {size: tap_counts(layer.reads(size))}
        same, both, positions = self._counts[size]
        for mean, counts in ((self.same, same), (self.both, both)):
            mean.total.add_(counts.to(mean.total), alpha=examples * mean.alpha)
            mean.weight += examples * positions
        for mean in (self.first, self.second):
            mean.weight += examples * math.prod(size)

    def _example_weights(self, weights: Tensor | None) -> Tensor | None:
        if weights is None:
            return None
        if bool((weights != weights[:, :1]).any()):
            raise NotImplementedError(
                f"Convolution {self.layer.name!r}: the loss weights the positions of an example differently (a mask, "
                "ignored targets or class weights), under which activations are not spatially homogeneous; use "
                "approximation='kfac'."
            )
        return weights[:, 0]

    def factor(self, boundaries: bool = True) -> Tensor:
        """Return the input factor.

        Args:
            boundaries: Whether to count at how many positions a tap reads an input; without, every tap is taken to do
                so at every position: equation (130) of Grosse & Martens 2016.

        Returns:
            ``A``, shape ``[*stack, d_in, d_in]``, in the order of the layer's rows.

        Raises:
            FloatingPointError: It is not finite.
        """
        mean, second = self.first.value(), mirror_(self.second.value())
        outer = mean.unsqueeze(-1) * mean.unsqueeze(-2)
        same, both = self.same.value(), self.both.value()
        if not boundaries:
            same, both = torch.eye(self.taps).to(same), torch.ones_like(both)
        weight = _kron(second - outer, same) + _kron(outer, both)
        if self.layer.has_bias:
            bias = (mean.unsqueeze(-1) * both.diagonal()).flatten(-2)
            one = bias.new_ones(*bias.shape[:-1], 1)
            side = torch.cat((bias, one), -1).unsqueeze(-1)
            weight = torch.cat((torch.cat((weight, bias.unsqueeze(-2)), -2), side), -1)
        if not all_finite(weight):
            raise FloatingPointError(f"The input factor of layer {self.layer.name!r} overflowed to NaN or Inf.")
        return weight


def _kron(channels: Tensor, taps: Tensor) -> Tensor:
    """Kronecker product with channels first, as a row's columns are ordered; ``channels`` may have a stack."""
    product = channels[..., :, None, :, None] * taps[:, None, :]
    return product.flatten(-4, -3).flatten(-2)


def reads_patches(layer: LayerAdapter) -> bool:
    """Whether a layer's rows are patches, about which SUA says something: a convolution with a trained weight.

    Args:
        layer: The layer's adapter.

    Returns:
        True if so.
    """
    return isinstance(layer, ConvAdapter) and layer.has_weight


class SUAStatistic(Statistic):
    """Channel moments of a convolution's input, and K-FAC's running ``G = (1/D) Σ g gᵀ``.

    Args:
        layer: The convolution's adapter.
    """

    by_rows = CHANNEL_MEANS

    def __init__(self, layer: ConvAdapter) -> None:
        super().__init__(layer)
        self.input = ChannelInput(layer)
        self.output = Mean(zeros(layer, *layer.stack, layer.d_out, layer.d_out))

    def means(self) -> dict[str, Mean]:
        """Those of the input, and the output factor."""
        return {**self.input.means(), "output": self.output}

    def add(self, sample: Sample) -> None:
        """Add the moments of one pull."""
        require_finite(sample)
        if sample.first:
            self.input.add(sample)
            self.output.weight += sample.denominator
        if sample.cotangents is not None:
            self.layer.add_output_gram_(self.output.total, sample.cotangents, sample.weight * self.output.alpha)
        elif sample.output_moment is not None:
            self.output.total.add_(sample.output_moment, alpha=sample.weight * self.output.alpha)
        elif sample.first:  # forward-only: the identity
            self.output.total.diagonal(dim1=-2, dim2=-1).add_(sample.denominator * self.output.alpha)

    def block(self) -> Block:
        """Return the Kronecker block."""
        input, output = self.input.factor(), mirror_(self.output.value())
        if not all_finite(output):
            raise FloatingPointError(f"The output factor of layer {self.layer.name!r} overflowed to NaN or Inf.")
        return Kronecker(input, output)


class SUA(Approximation):
    """K-FAC and KFC, with the activations that convolutions read taken as spatially uncorrelated up to their mean.

    Theorem 4 of Grosse & Martens (2016) without its white derivatives: ``β(δ,δ') Ω̃(j,j',δ'-δ) Γ(i,i',0)``.  Layers
    without patches (linear, embedding) have K-FAC's factors, normalisation layers the exact block of every unit.
    """

    name = "sua"
    needs_cotangents = False
    keeps_trace = False

    def start(self, layer: LayerAdapter) -> Statistic:
        """Return empty statistics.

        Args:
            layer: The layer's adapter.

        Returns:
            The statistic.
        """
        if layer.unit_wise:
            return DenseStatistic(layer)
        if reads_patches(layer):
            assert isinstance(layer, ConvAdapter)
            return SUAStatistic(layer)
        return KFACStatistic(layer)
