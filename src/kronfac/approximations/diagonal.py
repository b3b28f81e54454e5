"""The exact diagonal: sums of squared per-example gradients."""

from __future__ import annotations

from torch import nn

from kronfac.approximations.base import Approximation, Mean, Statistic, require_finite, zeros
from kronfac.blocks import Block, Diagonal
from kronfac.layers import LayerAdapter
from kronfac.linalg.symmetric import add_product_, all_finite
from kronfac.sources import Sample, require_examples

#: Entries of per-example gradients held at once.
CHUNK = 1 << 24


class DiagonalStatistic(Statistic):
    """Running ``(1/D) Σ_n ∇_n²``.

    Args:
        layer: The layer's adapter.
    """

    def __init__(self, layer: LayerAdapter) -> None:
        super().__init__(layer)
        self.squares = Mean(zeros(layer, *layer.shape))

    def means(self) -> dict[str, Mean]:
        """The mean square."""
        return {"squares": self.squares}

    def add(self, sample: Sample) -> None:
        """Add one pull's squared per-example gradients, a bounded number of examples at a time."""
        require_finite(sample)
        if sample.first:
            self.squares.weight += sample.denominator
        if sample.cotangents is None:
            raise ValueError("approximation='diagonal' needs cotangents.")
        require_examples(self.layer, sample.inputs, sample.batch, "approximation='diagonal'")
        alpha = sample.weight * self.squares.alpha
        if isinstance(self.layer.module, nn.Linear) and len(self.layer.positions(sample.inputs)) == 1:
            # One outer product for each example: its square is the product of two squares.
            sides = self.layer.expand_cotangents(sample.cotangents), self.layer.expand(sample.inputs)
            left, right = (rows.squeeze(1).to(self.squares.total.dtype).square() for rows in sides)
            add_product_(self.squares.total, left, right, alpha=alpha)
            return
        per_chunk = max(1, CHUNK // max(1, self.layer.shape.numel()))
        pairs = zip(sample.inputs.split(per_chunk), sample.cotangents.split(per_chunk), strict=True)
        if sample.inputs.shape[0] <= per_chunk or self.layer.unit_wise:
            # Normalisation over the batch must see the whole of it.
            pairs = iter([(sample.inputs, sample.cotangents)])  # type: ignore[assignment]
        for x, g in pairs:
            gradients = self.layer.per_example_gradients(x, g)
            self.squares.total.add_(gradients.square().sum(0), alpha=alpha)

    def block(self) -> Block:
        """Return the diagonal block."""
        value = self.squares.value()
        if not all_finite(value):
            raise FloatingPointError(f"The diagonal of layer {self.layer.name!r} overflowed to NaN or Inf.")
        return Diagonal(value)


class DiagonalBlocks(Approximation):
    """Exact diagonal of the Fisher, Gauss-Newton or empirical Fisher, as elastic weight consolidation uses it."""

    name = "diagonal"
    needs_pairs = True
    needs_examples = True

    def start(self, layer: LayerAdapter) -> Statistic:
        """Return empty squares.

        Args:
            layer: The layer's adapter.

        Returns:
            The statistic.
        """
        return DiagonalStatistic(layer)
