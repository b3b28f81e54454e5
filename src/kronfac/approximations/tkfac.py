"""TKFAC: one Kronecker product per layer that keeps both partial traces, and so the trace, of the layer's block."""

from __future__ import annotations

from torch import Tensor

from kronfac.approximations.base import Approximation, Mean, Statistic, require_finite, zeros
from kronfac.approximations.dense import DenseStatistic
from kronfac.blocks import Block, ScaledKronecker
from kronfac.layers import LayerAdapter
from kronfac.linalg.symmetric import all_finite, mirror_
from kronfac.sources import Sample


class TKFACStatistic(Statistic):
    """Running ``(1/D) Σ |g|² ā āᵀ`` and ``(1/D) Σ |ā|² g gᵀ`` over examples, positions and pulls.

    They are the partial traces of ``(1/D) Σ ā āᵀ ⊗ g gᵀ`` (Gao et al. 2020, equations 4.9 and 4.11), and the trace of
    either is ``δ = (1/D) Σ |ā|²|g|²``: a third mean would hold nothing new.  ``D`` is the loss's denominator; the
    weights of terms are in the cotangents already.  Moving averages are linear, so that the averaged block has the
    averaged trace, which (5.18) and (5.19), averages of damped factors, do not give.

    Args:
        layer: The layer's adapter.
    """

    def __init__(self, layer: LayerAdapter) -> None:
        super().__init__(layer)
        shape = (layer.d_in,) if layer.diagonal_input else (*layer.stack, layer.d_in, layer.d_in)
        self.input = Mean(zeros(layer, *shape))
        self.output = Mean(zeros(layer, *layer.stack, layer.d_out, layer.d_out))

    def means(self) -> dict[str, Mean]:
        """Both partial traces."""
        return {"input": self.input, "output": self.output}

    def add(self, sample: Sample) -> None:
        """Add the weighted second moments of one pull.

        Args:
            sample: Input and cotangent of one pull.

        Raises:
            ValueError: There is no cotangent, or its positions are not those of the input.
        """
        require_finite(sample)
        layer, cotangents = sample.layer, sample.cotangents
        if cotangents is None:
            raise ValueError("approximation='tkfac' needs cotangents.")
        inputs, outputs = layer.input_norms(sample.inputs), layer.output_norms(cotangents)
        if inputs.shape != outputs.shape:
            raise ValueError(
                f"Layer {layer.name!r}: its input has rows {tuple(inputs.shape)}, its cotangent "
                f"{tuple(outputs.shape)}; approximation='tkfac' pairs them one by one: call the layer with its "
                "default output size."
            )
        if sample.first:
            self.input.weight += sample.denominator
            self.output.weight += sample.denominator
        layer.add_input_gram_(self.input.total, sample.inputs, outputs, sample.weight * self.input.alpha)
        layer.add_output_gram_(self.output.total, cotangents, sample.weight * self.output.alpha, inputs)

    def delta(self) -> Tensor:
        """Return ``δ``, shape ``[*stack]``."""
        return self.output.value().diagonal(dim1=-2, dim2=-1).sum(-1)

    def block(self) -> Block:
        """Return ``δ Φ ⊗ Ψ``.

        Raises:
            FloatingPointError: A moment overflowed.
        """
        input, output = self.input.value(), mirror_(self.output.value())
        for what, moment in (("input", input), ("output", output)):
            if not all_finite(moment):
                raise FloatingPointError(f"The {what} factor of layer {self.layer.name!r} overflowed to NaN or Inf.")
        return ScaledKronecker.from_moments(input if self.layer.diagonal_input else mirror_(input), output)


class TKFAC(Approximation):
    """``F_ℓ ≈ δ Φ ⊗ Ψ`` with ``tr Φ = tr Ψ = 1`` (Gao et al. 2020, Theorems 4.1 and 4.3).

    The trace of a linear layer's block is exact; that of a convolution's is exact under the paper's assumption 4.1,
    that products at different positions are uncorrelated.  Normalisation layers keep the exact block of every unit.
    """

    name = "tkfac"
    needs_pairs = True

    def start(self, layer: LayerAdapter) -> Statistic:
        """Return empty statistics for a layer.

        Args:
            layer: The layer's adapter.

        Returns:
            The statistic.
        """
        return DenseStatistic(layer) if layer.unit_wise else TKFACStatistic(layer)
