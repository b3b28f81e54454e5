"""Correlations of the products of activations and derivatives between locations: figures 7 and 8 of the TKFAC paper.

A convolution's gradient is the sum over locations ``t`` of the products ``u_t a_tᵀ`` of a derivative and a patch.
Assumption 4.1 of Gao et al. (2020) takes products at different locations as uncorrelated; KFC's three assumptions
(Grosse & Martens 2016) imply it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.forwards import batches_of, call_model
from kronfac.layers import adapt_model
from kronfac.layers.conv import ConvAdapter
from kronfac.likelihoods import Likelihood
from kronfac.measuring import frozen_buffers
from kronfac.operators.passes import RandomStream
from kronfac.sources import Sampled
from kronfac.tape import record

#: Entries of Gram matrices of locations held at once.
_HELD = 1 << 24


@dataclass(frozen=True)
class LocationCorrelation:
    """Correlations between the products at two locations of one convolution's output.

    Both kinds are uncentred: with labels drawn from the model, products have mean zero.

    Attributes:
        layer: The layer's name.
        size: Spatial size of its output.
        trace: ``E⟨p_s, p_t⟩ / √(E|p_s|² E|p_t|²)`` of whole products ``p_t = u_t a_tᵀ``: the normalised trace of the
            covariance of the products at two locations, ``[T, T]``.
        entries: Mean over some entries of the product of the absolute correlation of that entry at two locations,
            ``[T, T]``.
        trace_floor: Mean absolute value that ``trace`` has between independent examples, from sampling alone.
        entries_floor: The same of ``entries``.
    """

    layer: str
    size: tuple[int, ...]
    trace: Tensor
    entries: Tensor
    trace_floor: float
    entries_floor: float

    def by_distance(self) -> list[tuple[int, float, float]]:
        """Mean absolute correlations, by the larger component of the offset between two locations.

        Returns:
            Distance, mean of ``trace``, mean of ``entries``; from distance 0.
        """
        axes = torch.meshgrid(*(torch.arange(n) for n in self.size), indexing="ij")
        places = torch.stack(axes).flatten(1)
        distance = (places[:, :, None] - places[:, None, :]).abs().amax(0)
        return [
            (d, float(self.trace[distance == d].abs().nanmean()), float(self.entries[distance == d].nanmean()))
            for d in range(int(distance.max()) + 1)
        ]


def location_correlation(
    model: nn.Module,
    likelihood: Likelihood,
    loader: Iterable[Any] | tuple[Any, Any],
    layers: Iterable[str],
    *,
    entries: int = 32,
    seed: int = 0,
) -> list[LocationCorrelation]:
    """Measure how products at different locations of convolutions are correlated.

    Args:
        model: The model, in the mode in which it is to be looked at.
        likelihood: The loss; labels are drawn from the model's prediction.
        loader: Pairs of inputs and targets, or one pair.
        layers: Names of convolutions without groups.
        entries: How many entries of the product to follow, drawn at random. A number is held for each of them, each
            example and each location.
        seed: Of the labels and the entries.

    Returns:
        One result per layer.

    Raises:
        ValueError: A layer is no such convolution, none is named, or there is no data.
    """
    found = adapt_model(model).adapters
    adapters = {name: found.get(name) for name in layers}
    for name, adapter in adapters.items():
        if not isinstance(adapter, ConvAdapter) or adapter.stack:
            fitting = [n for n, a in found.items() if isinstance(a, ConvAdapter) and not a.stack]
            raise ValueError(f"layer {name!r} is no convolution without groups; those there are: {', '.join(fitting)}")
    if not adapters:
        raise ValueError("no layer was named; name convolutions without groups")
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    picker = torch.Generator().manual_seed(seed)
    source, sums = Sampled(), {}
    draws = RandomStream(model, seed)
    with frozen_buffers(model):
        for inputs, targets in batches_of(loader):
            with draws(), torch.enable_grad(), record({n: a for n, a in adapters.items() if a is not None}) as tape:
                outputs = call_model(model, inputs)
            for sample in next(source.samples(tape, likelihood, outputs, targets, generator)):
                layer = sample.layer
                assert isinstance(layer, ConvAdapter)
                assert sample.cotangents is not None
                if layer.name not in sums:
                    places = layer.positions(sample.inputs)[1:]
                    sums[layer.name] = _Products(layer, places, entries, picker)
                sums[layer.name].add(sample.inputs, sample.cotangents)
    if not sums:
        raise ValueError("loader is empty: no batch to correlate products over.")
    return [products.result() for products in sums.values()]


class _Products:
    """Sums over examples for one layer."""

    def __init__(self, layer: ConvAdapter, size: tuple[int, ...], entries: int, picker: torch.Generator) -> None:
        self.layer, self.size = layer, size
        self.columns = torch.randint(layer.d_in, (entries,), generator=picker)
        self.rows = torch.randint(layer.d_out, (entries,), generator=picker)
        count = torch.Size(size).numel()
        self.gram = torch.zeros(count, count, dtype=torch.float64)
        self.strangers = torch.zeros(count, count, dtype=torch.float64)
        self.products: list[Tensor] = []
        self.first: tuple[Tensor, Tensor] | None = None
        self.last: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, g: Tensor) -> None:
        per_chunk = max(2, _HELD // len(self.gram) ** 2)
        for inputs, cotangents in zip(x.split(per_chunk), g.split(per_chunk), strict=True):
            a, u = self.layer.expand(inputs), self.layer.expand_cotangents(cotangents)
            self.gram += ((a @ a.mT) * (u @ u.mT)).sum(0).cpu()
            # The next example's products instead of the own ones: what independent products look like.
            self._pair((a[1:], u[1:]), (a[:-1], u[:-1]))
            if self.last is not None:
                self._pair((a[:1], u[:1]), self.last)
            self.first, self.last = self.first or (a[:1], u[:1]), (a[-1:], u[-1:])
            entry = a[..., self.columns] * u[..., self.rows]
            self.products.append(entry.movedim(-1, 0).cpu())

    def _pair(self, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
        self.strangers += ((one[0] @ other[0].mT) * (one[1] @ other[1].mT)).sum(0).cpu()

    def result(self) -> LocationCorrelation:
        products = torch.cat(self.products, 1)
        if self.first is not None and self.last is not None and products.shape[1] > 1:
            self._pair(self.first, self.last)  # the ring is closed
        scale = _inverse_root(self.gram.diagonal())
        trace = self.gram * scale[:, None] * scale[None, :]
        floor = (self.strangers * scale[:, None] * scale[None, :]).abs().nanmean()
        size, count = torch.zeros_like(self.gram), torch.zeros_like(self.gram)
        noise = []
        for entry in products:  # [N, T]
            values = entry.double()
            own = _inverse_root(values.square().sum(0))
            correlation = ((values.T @ values) * own[:, None] * own[None, :]).abs()
            size += correlation.nan_to_num(0.0)
            count += ~correlation.isnan()
            noise.append(((values.T @ values.roll(1, 0)) * own[:, None] * own[None, :]).abs().nanmean())
        return LocationCorrelation(
            self.layer.name,
            self.size,
            trace,
            torch.where(count > 0, size / count, torch.nan),
            float(floor),
            float(torch.stack(noise).nanmean()),
        )


def _inverse_root(squares: Tensor) -> Tensor:
    """``1/√x``, and NaN for zero: correlations with what is zero are undefined."""
    return torch.where(squares > 0, squares, torch.nan).rsqrt()
