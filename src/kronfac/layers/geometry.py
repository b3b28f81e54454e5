"""Geometry of a convolution, and its input as explicit rows (*im2col*)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Geometry:
    """What a convolution does to positions; every tuple has one entry per spatial dimension.

    Attributes:
        kernel: Kernel sizes.
        stride: Strides.
        dilation: Dilations.
        padding: ``(before, after)`` of each dimension.
        mode: ``"constant"``, ``"reflect"``, ``"replicate"`` or ``"circular"``, as ``torch.nn.functional.pad`` has it.
        groups: Number of groups.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    mode: str
    groups: int

    @classmethod
    def of(cls, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Geometry:
        """Read the geometry of a convolution module."""
        kernel, stride, dilation = tuple(module.kernel_size), tuple(module.stride), tuple(module.dilation)
        if module.padding == "valid":
            padding = tuple((0, 0) for _ in kernel)
        elif module.padding == "same":
            total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            padding = tuple((t // 2, t - t // 2) for t in total)
        else:
            padding = tuple((int(p), int(p)) for p in module.padding)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return cls(kernel, stride, dilation, padding, mode, module.groups)

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial size of the output for an input of spatial size ``size``."""
        parts = zip(size, self.kernel, self.stride, self.dilation, self.padding, strict=True)
        return tuple((n + sum(p) - d * (k - 1) - 1) // s + 1 for n, k, s, d, p in parts)

    def pad(self, x: Tensor) -> Tensor:
        """Pad ``[N, C, *size]`` as the layer does."""
        flat = [side for pair in reversed(self.padding) for side in pair]
        return F.pad(x, flat, mode=self.mode) if any(flat) else x


def im2col(x: Tensor, geometry: Geometry) -> Tensor:
    """Rows of a convolution, one per output position.

    Args:
        x: Input ``[N, C, *size]``.
        geometry: The convolution.

    Returns:
        Rows ``[N, T, groups, (C/groups)·prod(kernel)]`` in the order of the weight's columns.
    """
    out = geometry.output_size(tuple(x.shape[2:]))
    x = geometry.pad(x)
    batch, per_group = x.shape[0], x.shape[1] // geometry.groups
    s_n, s_c, *strides = x.stride()
    step = [a * m for a, m in zip(strides, geometry.stride, strict=True)]
    tap = [a * m for a, m in zip(strides, geometry.dilation, strict=True)]
    view = x.as_strided(
        (batch, *out, geometry.groups, per_group, *geometry.kernel), (s_n, *step, s_c * per_group, s_c, *tap)
    )
    return view.reshape(batch, math.prod(out), geometry.groups, per_group * math.prod(geometry.kernel))


def column_sums(x: Tensor, geometry: Geometry) -> Tensor:
    """Sum of all rows, ``[groups, (C/groups)·prod(kernel)]``, from the input's batch sum alone."""
    total = x.sum(0, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return im2col(total, geometry).sum((0, 1))


def reads(geometry: Geometry, size: tuple[int, ...], stuffing: tuple[int, ...] | None = None) -> tuple[Tensor, ...]:
    """Tabulate which input position each tap of the kernel reads: the dimensions are independent of one another.

    Args:
        geometry: The convolution.
        size: Spatial size of the input.
        stuffing: Distance that zeros put between neighbouring input positions (transposed convolutions); none by
            default.

    Returns:
        For each spatial dimension a table ``[positions, taps]`` of input indices; -1 where a tap reads a zero that is
        no input (padding, stuffing).
    """
    tables = []
    for dim, n in enumerate(size):
        step = stuffing[dim] if stuffing else 1
        places = torch.zeros((n - 1) * step + 1, dtype=torch.float64)
        places[::step] = torch.arange(1, n + 1, dtype=torch.float64)  # zero stands for what is no input
        padded = F.pad(places[None, None], geometry.padding[dim], mode=geometry.mode)[0, 0]
        kernel, stride, dilation = geometry.kernel[dim], geometry.stride[dim], geometry.dilation[dim]
        count = (len(padded) - dilation * (kernel - 1) - 1) // stride + 1
        index = torch.arange(count)[:, None] * stride + torch.arange(kernel)[None, :] * dilation
        tables.append(padded[index].long() - 1)
    return tuple(tables)
