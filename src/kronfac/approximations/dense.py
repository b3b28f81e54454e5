"""The exact block of a layer (per stack element): the second moment of per-example gradients."""

from __future__ import annotations

from torch import Tensor

from kronfac.approximations.base import Approximation, Mean, Statistic, require_finite, require_no_moment, zeros
from kronfac.blocks import Block, Dense
from kronfac.layers import LayerAdapter
from kronfac.layers.norm import NormAdapter
from kronfac.linalg.symmetric import add_gram_, all_finite, mirror_
from kronfac.sources import Sample, not_finite, require_examples

#: Largest block kept densely: 2 GiB in float64.
LIMIT = 16_384


class DenseStatistic(Statistic):
    """Running ``(1/D) Σ_n ∇_n ∇_nᵀ`` with ``∇_n`` the gradient of one example's loss.

    Args:
        layer: The layer's adapter.

    Raises:
        ValueError: The block would be too large.
    """

    def __init__(self, layer: LayerAdapter) -> None:
        super().__init__(layer)
        size = layer.d_out * layer.d_in
        if size > LIMIT:
            raise ValueError(
                f"A dense block for layer {layer.name!r} needs {size}×{size} entries "
                f"({size * size * 4 / 2**30:.1f} GiB in float32); use approximation='kfac' or 'diagonal'."
            )
        self.moment = Mean(zeros(layer, *layer.stack, size, size))

    def means(self) -> dict[str, Mean]:
        """The second moment."""
        return {"moment": self.moment}

    def add(self, sample: Sample) -> None:
        """Add the outer products of one pull's per-example gradients."""
        require_no_moment(sample)
        gradients = None if sample.cotangents is None else self._gradients(sample, sample.cotangents)
        if sample.first:
            self.moment.weight += sample.denominator
        if gradients is not None:
            rows = gradients.flatten(-2).movedim(0, -2)
            add_gram_(self.moment.total, rows.to(self.moment.total.dtype), alpha=sample.weight * self.moment.alpha)
        elif sample.first:
            # Forward-only has no gradients; unit cotangents keep the scale of the identity output factor.
            self.moment.total.diagonal(dim1=-2, dim2=-1).add_(sample.denominator * self.moment.alpha)

    def _gradients(self, sample: Sample, cotangents: Tensor) -> Tensor:
        """Those of the examples, refused if they are not finite: of units they are fewer numbers than the cotangent."""
        if not self.layer.unit_wise:
            require_finite(sample)
        if isinstance(self.layer, NormAdapter):  # whose block is dense in every approximation
            require_examples(self.layer, sample.inputs, sample.batch, "The block of a normalisation layer", None)
        require_examples(self.layer, sample.inputs, sample.batch, "A dense block")
        gradients = self.layer.per_example_gradients(sample.inputs, cotangents)
        if self.layer.unit_wise and not sample.checked and not all_finite(gradients):
            require_finite(sample)
            what = "gradients" if all_finite(sample.inputs) else "input"
            raise FloatingPointError(not_finite(what, self.layer.name))
        return gradients

    def block(self) -> Block:
        """Return the dense block."""
        moment = mirror_(self.moment.value())
        if not all_finite(moment):
            raise FloatingPointError(f"The block of layer {self.layer.name!r} overflowed to NaN or Inf.")
        return Dense(moment, self.layer.shape)

    @property
    def drafts(self) -> bool:
        """The blocks of units are small."""
        return self.layer.unit_wise

    def draft(self) -> Block:
        """Return the dense block; a factorisation will find whether it is finite."""
        return Dense(mirror_(self.moment.value()), self.layer.shape)


class DenseBlocks(Approximation):
    """No approximation but block-diagonality: exact per layer (per group of a grouped layer, per unit of a norm)."""

    name = "dense"
    needs_pairs = True
    needs_examples = True

    def start(self, layer: LayerAdapter) -> Statistic:
        """Return an empty moment.

        Args:
            layer: The layer's adapter.

        Returns:
            The statistic.
        """
        return DenseStatistic(layer)
