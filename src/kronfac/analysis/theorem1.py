"""KFC's factors from autocovariance functions: Theorem 1 of Grosse & Martens (2016), to compare with Theorem 2.

Theorem 1 writes a convolution's factors in terms of functions of the offset between two locations, equations (20) to
(26); Theorem 2 estimates the same factors by the second moments of patches, which is what `kronfac` does.  They agree
where the data are spatially homogeneous (SH), and the first may lose positive semi-definiteness where they are not.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kronfac.layers.base import require_float
from kronfac.layers.conv_moments import add_conv_gram_
from kronfac.layers.geometry import Geometry
from kronfac.linalg.symmetric import mirror_

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def mean_activation(x: Tensor) -> Tensor:
    """Estimate ``M(j) = E[a_{j,t}]``, equation (20).

    Args:
        x: Activations ``[N, J, *size]``.

    Returns:
        The mean over examples and locations, ``[J]``.
    """
    return x.transpose(0, 1).flatten(1).mean(1)


def autocovariance(x: Tensor, reach: tuple[int, ...]) -> Tensor:
    """Estimate the uncentred ``Ω(j, j', d) = E[a_{j,t} a_{j',t+d}]``, equation (21).

    Args:
        x: Activations ``[N, J, *size]``.
        reach: Largest offset in each spatial dimension.

    Returns:
        The mean over examples and over all pairs of locations at the offset, ``[J, J, *(2 reach + 1)]``, with the zero
        offset in the middle; zero where no pair of locations lies so far apart.
    """
    maps, size = x.shape[1], tuple(x.shape[2:])
    found = x.new_zeros(maps, maps, *(2 * r + 1 for r in reach))
    for offset in itertools.product(*(range(-r, r + 1) for r in reach)):
        if offset < tuple(0 for _ in offset):
            continue  # Ω(j, j', -d) = Ω(j', j, d)
        here = [slice(max(0, -d), n - max(0, d)) for d, n in zip(offset, size, strict=True)]
        there = [slice(max(0, d), n + min(0, d)) for d, n in zip(offset, size, strict=True)]
        if any(abs(d) >= n for d, n in zip(offset, size, strict=True)):
            continue
        left, right = (x[(slice(None), slice(None), *places)].transpose(0, 1).flatten(1) for places in (here, there))
        moment = left @ right.T / left.shape[1]
        for sign, part in ((1, moment), (-1, moment.T)):
            place: tuple[slice | int, ...] = (
                slice(None),
                slice(None),
                *(r + sign * d for r, d in zip(reach, offset, strict=True)),
            )
            found[place] = part
    return found


def boundary_counts(size: tuple[int, ...], radius: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Count locations ``t`` with ``t + δ``, and with both ``t + δ`` and ``t + δ'``, inside the map: equation (24).

    Printed without the cut at zero that it needs where a filter is larger than the map.

    Args:
        size: Size of the map.
        radius: Radius ``R`` of the filter in each dimension; stride 1 and padding ``R`` are understood.

    Returns:
        ``β(δ)``, ``[|Δ|]``, and ``β(δ, δ')``, ``[|Δ|, |Δ|]``, offsets in row-major order, float64.
    """
    one = two = torch.ones(1, 1, dtype=torch.float64)
    for n, r in zip(size, radius, strict=True):
        offsets = torch.arange(-r, r + 1, dtype=torch.float64)
        first, second = torch.meshgrid(offsets, offsets, indexing="ij")
        zero = torch.zeros_like(first)
        largest = torch.maximum(torch.maximum(first, second), zero)
        smallest = torch.minimum(torch.minimum(first, second), zero)
        two = torch.kron(two, (n - largest + smallest).clamp(min=0.0))
        one = torch.kron(one, (n - offsets.abs()).clamp(min=0.0).unsqueeze(0))
    return one[0], two


def theorem1_input_factor(x: Tensor, radius: tuple[int, ...], bias: bool = True) -> Tensor:
    """Assemble the input factor of equation (26) from estimated autocovariances.

    Args:
        x: Activations ``[N, J, *size]`` that a convolution with stride 1 and padding ``R`` reads.
        radius: Radius ``R`` of its filter in each dimension.
        bias: Whether there is a row and column for the bias.

    Returns:
        ``Ω / |T|``, which is `kronfac`'s ``A``, in the order of its rows: maps, then offsets, the bias last.
        Symmetric, but not always positive semi-definite (section 3.1).
    """
    x = require_float(x)
    maps, size, lengths = x.shape[1], tuple(x.shape[2:]), [4 * r + 1 for r in radius]
    count = math.prod(2 * r + 1 for r in radius)
    places = torch.zeros(count, count, dtype=torch.long)
    offsets = torch.tensor(list(itertools.product(*(range(-r, r + 1) for r in radius)))).reshape(count, len(radius))
    for dim, (r, length) in enumerate(zip(radius, lengths, strict=True)):
        lag = offsets[None, :, dim] - offsets[:, None, dim] + 2 * r  # δ' - δ
        places = places * length + lag
    covariance = autocovariance(x, tuple(2 * r for r in radius)).flatten(2)[:, :, places.to(x.device)]
    one, two = (counts.to(x) / math.prod(size) for counts in boundary_counts(size, radius))
    weight = (covariance * two).transpose(1, 2).reshape(maps * count, maps * count)
    if not bias:
        return weight
    side = (mean_activation(x).unsqueeze(-1) * one).flatten()
    corner = torch.cat((side, side.new_ones(1)))
    return torch.cat((torch.cat((weight, side.unsqueeze(0))), corner.unsqueeze(-1)), 1)


def theorem1_output_factor(g: Tensor) -> Tensor:
    """Estimate the output factor of equation (26), ``Γ(i, i', 0)``, from derivatives; Theorem 2 gives the same.

    Args:
        g: Derivatives ``[N, I, *size]`` of each example's own loss in a convolution's output.

    Returns:
        ``|T| Γ``, which is `kronfac`'s ``G`` for a loss averaged over examples, ``[I, I]``.
    """
    columns = require_float(g).transpose(0, 1).flatten(1)
    return columns @ columns.T / g.shape[0]


def theorem1_factors(layer: Convolution, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Compute both factors of Theorem 1 for a layer of which it speaks.

    Args:
        layer: A convolution with stride 1 and zeros of width ``R`` around its input.
        x: Its inputs ``[N, J, *size]``.
        g: Derivatives of each example's own loss in its outputs, ``[N, I, *size]``.

    Returns:
        ``Ω / |T|`` and ``|T| Γ``, `kronfac`'s ``A`` and ``G``.
    """
    return theorem1_input_factor(x, _radius(layer), layer.bias is not None), theorem1_output_factor(g)


@dataclass(frozen=True)
class Theorem1Gap:
    """How far the analytic input factor is from the second moment of patches.

    Attributes:
        error: Frobenius norm of the difference, over that of the latter.
        least: Least eigenvalue of the analytic factor, over its greatest; below zero the factor is no covariance.
        plug_in_least: The same of the second moment of patches.
    """

    error: float
    least: float
    plug_in_least: float


def theorem1_gap(layer: Convolution, x: Tensor) -> Theorem1Gap:
    """Compare the input factors of Theorem 1 and of Theorem 2 on given inputs.

    Args:
        layer: A convolution with stride 1 and zeros of width ``R`` around its input.
        x: Its inputs ``[N, J, *size]``.

    Returns:
        The gap.
    """
    radius, bias, x = _radius(layer), layer.bias is not None, x.double()
    analytic = theorem1_input_factor(x, radius, bias)
    patches = torch.zeros_like(analytic)
    count = add_conv_gram_(patches.unsqueeze(0), x, Geometry.of(layer), ones=bias)
    patches = mirror_(patches) / count
    least = [torch.linalg.eigvalsh(factor) for factor in (analytic, patches)]
    return Theorem1Gap(
        error=float((analytic - patches).norm() / patches.norm()),
        least=float(least[0][0] / least[0][-1]),
        plug_in_least=float(least[1][0] / least[1][-1]),
    )


def _radius(layer: Convolution) -> tuple[int, ...]:
    """Radius of a layer's filter, if equation (24) holds for the layer."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise TypeError(f"Theorem 1 is about convolutions, not {type(layer).__name__}.")
    kernel = tuple(layer.kernel_size)
    radius = tuple(k // 2 for k in kernel)
    same = layer.padding == "same" or tuple(layer.padding) == radius
    fits = (
        ("kernel_size", kernel, all(k % 2 == 1 for k in kernel)),
        ("padding", layer.padding, same),
        ("padding_mode", layer.padding_mode, layer.padding_mode == "zeros"),
        ("stride", layer.stride, all(s == 1 for s in layer.stride)),
        ("dilation", layer.dilation, all(d == 1 for d in layer.dilation)),
        ("groups", layer.groups, layer.groups == 1),
    )
    for name, value, fine in fits:
        if not fine:
            raise ValueError(
                f"Theorem 1 holds for odd kernels with stride 1, no dilation, one group and zeros of half a kernel "
                f"around the input; this layer has {name}={value!r}."
            )
    return radius
