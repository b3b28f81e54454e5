"""A convolution's rows by kernel lines: unfolded along all but the first spatial dimension, never as whole patches.

Let ``U_m`` hold, for input row ``m`` (a line of the first spatial dimension), the input unfolded along the other
spatial dimensions only.  The part of patch ``(y, x)`` under kernel line ``i`` is then row ``x`` of ``U_{ys+id}``, so
that the block of a second moment for kernel lines ``i, i'`` is a product of whole rows of ``U``.  With a stride ``s``
the rows of each residue class modulo ``s`` play this part.  Rows of padding hold zeros and are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from kronfac.layers.geometry import Geometry

#: Entries unfolded at once: 8 MB in float32, which costs no time and bounds the memory.
UNFOLDED = 1 << 21
#: The same for an accelerator, 512 MB, where small products leave most of it idle.
UNFOLDED_ACCELERATOR = 1 << 27


@dataclass(frozen=True)
class LinePair:
    """Block of kernel lines ``(i, j)``: rows ``[start, stop)`` of class ``left`` correlated with class ``right``."""

    i: int
    j: int
    left: int
    right: int
    lag: int
    start: int
    stop: int


def residue_rows(geometry: Geometry, height: int) -> dict[int, tuple[int, int]]:
    """Rows ``m`` of every residue class that hold data: input row ``m·s + class - padding`` lies in the map."""
    stride, dilation, pad = geometry.stride[0], geometry.dilation[0], geometry.padding[0][0]
    out = {}
    for residue in {i * dilation % stride for i in range(geometry.kernel[0])}:
        low = math.ceil((pad - residue) / stride)
        high = (height - 1 + pad - residue) // stride + 1
        out[residue] = (low, max(low, high))
    return out


@lru_cache(maxsize=256)
def line_pairs(geometry: Geometry, height: int, lines: int) -> tuple[LinePair, ...]:
    """Row ranges of all pairs of kernel lines, ordered so that neighbours share class and lag."""
    stride, dilation = geometry.stride[0], geometry.dilation[0]
    held = residue_rows(geometry, height)
    pairs = []
    for i in range(geometry.kernel[0]):
        for j in range(i, geometry.kernel[0]):
            (q, left), (r, right) = divmod(i * dilation, stride), divmod(j * dilation, stride)
            lag = r - q
            start = max(q, held[left][0], held[right][0] - lag)
            stop = min(q + lines, held[left][1], held[right][1] - lag)
            pairs.append(LinePair(i, j, left, right, lag, start, max(start, stop)))
    return tuple(sorted(pairs, key=lambda p: (p.left, p.right, p.lag, p.i)))


def zero_padded(x: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """Return input and geometry with no padding other than zeros."""
    if geometry.mode == "constant":
        return x, geometry
    none = tuple((0, 0) for _ in geometry.kernel)
    return geometry.pad(x), replace(geometry, padding=none, mode="constant")


def examples_at_once(x: Tensor, geometry: Geometry, out: tuple[int, ...]) -> int:
    """Number of examples whose unfolded rows are held together."""
    per_example = x.shape[1] * x.shape[2] * math.prod(out[1:]) * math.prod(geometry.kernel[1:])
    at_once = UNFOLDED if x.device.type == "cpu" else UNFOLDED_ACCELERATOR
    return max(1, at_once // max(1, per_example))


def unfold_lines(x: Tensor, geometry: Geometry, out: tuple[int, ...]) -> dict[int, tuple[Tensor, int]]:
    """Unfold the rows of each residue class; ``geometry`` pads by zeros only.

    Args:
        x: Input ``[N, C, *size]``.
        geometry: The convolution.
        out: Its output size.

    Returns:
        By class: ``[groups, rows, N, positions, taps·C/groups]``, channels last, and the first row's number ``m``.
    """
    stride, pad = geometry.stride[0], geometry.padding[0][0]
    unfolded: dict[int, tuple[Tensor, int]] = {}
    for residue, (low, high) in residue_rows(geometry, x.shape[2]).items():
        first = low * stride + residue - pad
        rows = slice(first, first + max(0, (high - low - 1) * stride + 1), stride)
        unfolded[residue] = (_unfold_trailing(x, geometry, out, rows), low)
    return unfolded


def _unfold_trailing(x: Tensor, geometry: Geometry, out: tuple[int, ...], rows: slice) -> Tensor:
    """Unfold all but the first spatial dimension: ``[groups, rows, N, positions, taps·C/groups]``, channels last."""
    x = x[:, :, rows]
    per_group, pads = x.shape[1] // geometry.groups, geometry.padding[1:]
    padded = [n + sum(p) for n, p in zip(x.shape[3:], pads, strict=True)]
    last = x.new_zeros(geometry.groups, x.shape[2], x.shape[0], *padded, per_group)
    inner = last
    for dim, (n, p) in enumerate(zip(x.shape[3:], pads, strict=True), 3):
        inner = inner.narrow(dim, p[0], n)
    inner.copy_(x.unflatten(1, (geometry.groups, per_group)).movedim((1, 3, 0), (0, 1, 2)).movedim(3, -1))
    strides = last.stride()
    step = [a * m for a, m in zip(strides[3:-1], geometry.stride[1:], strict=True)]
    tap = [a * m for a, m in zip(strides[3:-1], geometry.dilation[1:], strict=True)]
    view = last.as_strided(
        (*last.shape[:3], *out[1:], *geometry.kernel[1:], per_group), (*strides[:3], *step, *tap, strides[-1])
    )
    # A reshape alone would stay a view of overlapping windows, and each product would copy it.
    return view.contiguous().view(*last.shape[:3], math.prod(out[1:]), math.prod(geometry.kernel[1:]) * per_group)


def add_block_(total: Tensor, block: Tensor, pair: LinePair, geometry: Geometry, alpha: float = 1.0) -> None:
    """Add a pair's block to a second moment, and its transpose to where it belongs.

    Args:
        total: ``[groups, d, d]`` in the order of the weight's columns: channels, lines, taps.
        block: ``[groups, F, F]``, taps before channels as :func:`unfold_lines` has them; both triangles.
        pair: The pair of kernel lines.
        geometry: The convolution.
        alpha: Factor of what is added.
    """
    lines, taps = geometry.kernel[0], math.prod(geometry.kernel[1:])
    channels = block.shape[-1] // taps
    blocks = total.unflatten(-1, (channels, lines, taps)).unflatten(1, (channels, lines, taps))
    block = block.unflatten(-1, (taps, channels)).unflatten(1, (taps, channels)).permute(0, 2, 1, 4, 3)
    blocks[:, :, pair.i, :, :, pair.j].add_(block, alpha=alpha)
    if pair.i != pair.j:
        # The matrix's triangles run over channels first, so both orders of the lines are needed.
        blocks[:, :, pair.j, :, :, pair.i].add_(block.permute(0, 3, 4, 1, 2), alpha=alpha)
