"""K-FAC's block-tridiagonal approximation: moments between the neighbouring layers of a chain as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kronfac.approximations.base import Mean, require_finite, zeros
from kronfac.approximations.joint import JointApproximation, JointStatistic
from kronfac.approximations.kfac import KFACStatistic
from kronfac.blocks import Kronecker, Link, Tridiagonal
from kronfac.layers import LayerAdapter
from kronfac.layers.linear import LinearAdapter
from kronfac.linalg.symmetric import add_product_
from kronfac.sources import Sample, require_examples

_NAME = "kfac_tridiagonal"


class TridiagonalStatistic(JointStatistic):
    """Running K-FAC factors of every layer, and ``A_{i,i+1} = E[ā_i ā_{i+1}ᵀ]``, ``G_{i,i+1} = (1/D) Σ g_i g_{i+1}ᵀ``.

    Both carry the weights and denominators of K-FAC's own factors, so that the factors of two neighbours and what is
    between them are the second moments of one joint vector.

    Args:
        layers: The layers' adapters by name.

    Attributes:
        order: The layers in the order of the chain; empty before the first sample.
    """

    def __init__(self, layers: Mapping[str, LayerAdapter]) -> None:
        super().__init__(layers)
        self.order: tuple[str, ...] = ()
        self._layers = {name: KFACStatistic(layer) for name, layer in layers.items()}
        self._links: list[tuple[Mean, Mean]] = []

    def means(self) -> dict[str, Mean]:
        """Factors of every layer, and the moments between neighbours once their order is known."""
        found = {
            f"{name}.{key}": mean for name, statistic in self._layers.items() for key, mean in statistic.means().items()
        }
        for name, (input, output) in zip(self.order, self._links, strict=False):
            found |= {f"{name}.input_next": input, f"{name}.output_next": output}
        return found

    def check_graph(self, feeders: Mapping[str | None, set[str]]) -> None:
        """Refuse a network in which some layer is not fed by the one before it, and by that alone.

        Args:
            feeders: From which layers each layer, and the outputs (``None``), take their values.

        Raises:
            ValueError: It is no chain; the text names the layer.
        """
        before: set[str] = set()
        for name, found in feeders.items():
            if found != before:
                what = "the outputs take their values" if name is None else f"layer {name!r} takes its input"
                whence = " and ".join(map(repr, sorted(found))) if found else "no other layer"
                wanted = " and ".join(map(repr, before)) if before else "no other layer"
                raise ValueError(
                    f"approximation={_NAME!r} needs a chain of layers, each fed by the one before it, but {what} "
                    f"from {whence} instead of {wanted}; use 'kfac'."
                )
            before = set() if name is None else {name}

    def add(self, samples: Sequence[Sample]) -> None:
        """Add the moments of one pull; nothing is changed if it is refused.

        Args:
            samples: One of each layer, in the order of the chain.
        """
        for sample in samples:
            _check(sample)
        self._set_order(tuple(sample.layer.name for sample in samples))
        for sample in samples:
            self._layers[sample.layer.name].add(sample)
        rows = [_rows(sample) for sample in samples]
        for sample, (lower, upper), (input, output) in zip(samples, pairwise(rows), self._links, strict=False):
            if sample.first:
                weights = sample.row_weights
                left = lower[0] if weights is None else lower[0] * weights.reshape(-1, 1).to(lower[0].dtype)
                add_product_(input.total, left, upper[0], alpha=input.alpha)
                input.weight += float(len(left)) if weights is None else float(weights.sum())
                output.weight += sample.denominator
            add_product_(output.total, lower[1], upper[1], alpha=sample.weight * output.alpha)

    def blocks(self) -> Tridiagonal:
        """Return the chain.

        Returns:
            Kronecker blocks, and the moments between them.

        Raises:
            FloatingPointError: A moment overflowed.
        """
        blocks: dict[str, Kronecker] = {}
        for name in self.order:
            block = self._layers[name].block()
            assert isinstance(block, Kronecker)
            blocks[name] = block
        links = [Link(input.value(), output.value()) for input, output in self._links]
        for (lower, upper), link in zip(pairwise(self.order), links, strict=True):
            if not all(bool(torch.isfinite(part).all()) for part in link):
                raise FloatingPointError(
                    f"The moments between layers {lower!r} and {upper!r} overflowed to NaN or Inf."
                )
        return Tridiagonal(blocks, links)

    def _set_order(self, names: tuple[str, ...]) -> None:
        if missing := [name for name in self.layers if name not in names]:
            raise ValueError(
                f"approximation={_NAME!r} needs every layer to be called exactly once in a forward pass; it never "
                f"called {missing}. Freeze them (requires_grad=False) or call them."
            )
        if self.order and names != self.order:
            raise ValueError(
                f"approximation={_NAME!r}: layers were called in the order {list(names)}, before in the order "
                f"{list(self.order)}; neighbours must stay the same."
            )
        if not self.order:
            layers = [self.layers[name] for name in names]
            self._links = [
                (Mean(zeros(lower, lower.d_in, upper.d_in)), Mean(zeros(lower, lower.d_out, upper.d_out)))
                for lower, upper in pairwise(layers)
            ]
            self.order = names


class KFACTridiagonal(JointApproximation):
    """``F⁻¹ ≈ ΞᵀΛΞ`` for a chain of linear layers (Martens & Grosse 2015, section 4.3).

    The order of the chain is that of the calls in the forward pass. Layers of other kinds, weights shared over
    positions and networks that are no chain are refused.
    """

    name = _NAME

    def start_all(self, layers: Mapping[str, LayerAdapter]) -> TridiagonalStatistic:
        """Return empty moments.

        Args:
            layers: The layers' adapters by name.

        Returns:
            The statistic.

        Raises:
            ValueError: A layer is no linear layer.
        """
        other = [
            f"{type(layer.module).__name__} {name!r}"
            for name, layer in layers.items()
            if not isinstance(layer, LinearAdapter)
        ]
        if other:
            raise ValueError(
                f"approximation={self.name!r} is for chains of nn.Linear layers; it does not take {', '.join(other)}. "
                "Freeze them (requires_grad=False), or use 'kfac'."
            )
        return TridiagonalStatistic(layers)


def _check(sample: Sample) -> None:
    require_finite(sample)
    if sample.inputs.ndim != 2:
        raise ValueError(
            f"approximation={_NAME!r} takes one row per example, but layer {sample.layer.name!r} was called with an "
            f"input of shape {tuple(sample.inputs.shape)}, whose positions share its weights; use 'kfac'."
        )
    require_examples(sample.layer, sample.inputs, sample.batch, f"approximation={_NAME!r}")


def _rows(sample: Sample) -> tuple[Tensor, Tensor]:
    """Rows ``ā`` and ``g`` of a layer, ``[B, d_in]`` and ``[B, d_out]``."""
    assert sample.cotangents is not None
    layer = sample.layer
    return layer.rows(sample.inputs)[:, 0], layer.output_rows(sample.cotangents)[:, 0]
