"""KFAC for linear layers and KFC for convolutions: one block ``A ⊗ G`` per layer."""

from __future__ import annotations

from torch import Tensor

from kronfac.approximations.base import Approximation, Mean, Statistic, require_finite, zeros
from kronfac.approximations.dense import DenseStatistic
from kronfac.blocks import Block, DiagonalKronecker, Kronecker, KroneckerSums
from kronfac.blocks.kronecker import diagonal
from kronfac.layers import LayerAdapter
from kronfac.linalg.symmetric import all_finite, mirror_
from kronfac.sources import Sample


class KFACStatistic(Statistic):
    """Running ``A = E[ā āᵀ]`` over rows and ``G = (1/D) Σ g gᵀ``.

    ``A`` is the mean over examples *and* positions; ``G`` sums over positions and divides by the loss's denominator
    ``D``.  For a convolution with ``|T|`` positions ``A = Ω/|T|`` and ``G = |T| Γ`` in terms of Grosse & Martens 2016,
    equations (31) and (32): the same product.  The upper triangles alone are kept up to date.

    Args:
        layer: The layer's adapter.
    """

    by_rows = frozenset({"input"})

    def __init__(self, layer: LayerAdapter) -> None:
        super().__init__(layer)
        shape = (layer.d_in,) if layer.diagonal_input else (*layer.stack, layer.d_in, layer.d_in)
        self.input = Mean(zeros(layer, *shape))
        self.output = Mean(zeros(layer, *layer.stack, layer.d_out, layer.d_out))

    def means(self) -> dict[str, Mean]:
        """Input and output factor."""
        return {"input": self.input, "output": self.output}

    def add(self, sample: Sample) -> None:
        """Add the second moments of one pull."""
        require_finite(sample)
        layer = self.layer
        if sample.first:
            self.input.weight += float(
                layer.add_input_gram_(self.input.total, sample.inputs, sample.row_weights, self.input.alpha)
            )
            self.output.weight += sample.denominator
        if sample.cotangents is not None:
            layer.add_output_gram_(self.output.total, sample.cotangents, sample.weight * self.output.alpha)
        elif sample.output_moment is not None:
            self.output.total.add_(sample.output_moment, alpha=sample.weight * self.output.alpha)
        elif sample.first:
            # Forward-only: the identity, times the denominator that block() divides by.
            self.output.total.diagonal(dim1=-2, dim2=-1).add_(sample.denominator * self.output.alpha)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return ``A`` and ``G`` as new, full symmetric tensors (``A`` a vector for embeddings)."""
        a = self.input.value()
        return (a if self.layer.diagonal_input else mirror_(a)), mirror_(self.output.value())

    def block(self) -> Block:
        """Return the Kronecker block."""
        self._check()
        return (DiagonalKronecker if self.layer.diagonal_input else Kronecker)(*self.factors())

    @property
    def drafts(self) -> bool:
        """Unless the input factor is a diagonal."""
        return not self.layer.diagonal_input

    def draft(self) -> Block:
        """Return the Kronecker block of the running sums themselves."""
        if not self.drafts:
            return self.block()
        (a, a_scale), (g, g_scale) = self.input.parts(), self.output.parts()
        return KroneckerSums(a, g, a_scale, g_scale)

    def _check(self) -> None:
        """Look at the diagonals, which the other entries of a sum of squares do not exceed."""
        a, g = self.input.total, self.output.total
        diagonals = {"input": a if self.layer.diagonal_input else diagonal(a), "output": diagonal(g)}
        if all_finite(*diagonals.values()):
            return
        what = next(what for what, entries in diagonals.items() if not all_finite(entries))
        raise FloatingPointError(f"The {what} factor of layer {self.layer.name!r} overflowed to NaN or Inf.")


class KFAC(Approximation):
    """``F_ℓ ≈ A ⊗ G`` (Martens & Grosse 2015, eq. 1; Grosse & Martens 2016, Theorem 1).

    Normalisation layers keep the exact block of every unit instead.
    """

    name = "kfac"
    needs_cotangents = False

    def start(self, layer: LayerAdapter) -> Statistic:
        """Return empty factors.

        Args:
            layer: The layer's adapter.

        Returns:
            The statistic.
        """
        return DenseStatistic(layer) if layer.unit_wise else KFACStatistic(layer)
